"""Random images of a data set's shape, so that a benchmark reads no data."""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from okddip.data.options import image_shape
from okddip.data.sources import Source, Split
from okddip.errors import ConfigError
from okddip.run.references import find_checkpoint
from okddip.training import checkpoint

EVALUATION_BATCHES = 2  # of the evaluation that is timed
MOST_BYTES = 200_000_000  # of images: as a data set is, more than caches hold


class DataShape(NamedTuple):
    """Shape of a data set's images, and the number of its classes."""

    image_size: tuple[int, int]  # height, width
    channels: int
    classes: int


KNOWN_SHAPES = {
    "cifar10": DataShape((32, 32), 3, 10),
    "cifar100": DataShape((32, 32), 3, 100),
    "fashion_mnist": DataShape((28, 28), 1, 10),
    "digits": DataShape((8, 8), 1, 10),
    "imagenet": DataShape((224, 224), 3, 1000),
}


def find_shape(config: DictConfig) -> tuple[DataShape, dict[str, Any]]:
    """The shape of a configuration's images; and `classes`, `mean` and `std` of its teacher, if it has one.

    The shape is that of the command line; else the teacher's; else the known one of the data set.

    Raises:
        ConfigError: the data set's shape is not known, and the command line does not give it.
    """
    known: dict[str, Any] = {}
    if config.dataset.name in KNOWN_SHAPES:
        known = KNOWN_SHAPES[config.dataset.name]._asdict()
    if config.dataset.get("image_size") is not None:
        known["image_size"] = image_shape(config.dataset.image_size)
    learned: dict[str, Any] = {}
    if config.method.get("teacher"):
        named = config.method.teacher
        teachers = list(named) if OmegaConf.is_list(named) else [named]
        if "auto" in teachers:
            raise ConfigError(
                "method.teacher=auto: task=benchmark trains no teacher. Name the checkpoint of one."
            )
        path = find_checkpoint("method.teacher", teachers[0], config.tracking.get("uri"))
        state = checkpoint.load(path)
        known = {name: state[name] for name in ("image_size", "channels")}
        known["classes"] = len(state["classes"])
        learned = {name: list(state[name]) for name in ("classes", "mean", "std")}
    given = {name: config.benchmark[name] for name in DataShape._fields if config.benchmark[name] is not None}
    if "image_size" in given:
        given["image_size"] = image_shape(given["image_size"])
    for name in DataShape._fields:
        if name not in known | given:
            raise ConfigError(
                f"benchmark.{name} is not given: dataset={config.options.dataset} does not say how large its"
                " images are or how many classes it has before it is read. Set benchmark.image_size,"
                " benchmark.channels and benchmark.classes."
            )
    height, width = (known | given)["image_size"]
    return DataShape(**known | given | {"image_size": (height, width)}), learned


def with_synthetic_images(config: DictConfig, shape: DataShape, learned: dict[str, Any]) -> DictConfig:
    """The configuration with random images in place of the data set's own; how they are loaded stays.

    Args:
        config: as composed.
        shape: of the images.
        learned: what a teacher learned from, if there is one: names of the classes, mean and std.
    """
    config = config.copy()
    height, width = shape.image_size
    most = min(50_000, MOST_BYTES // (height * width * shape.channels))
    batch = config.trainer.batch_size
    kept = ("name", "mean", "std", "pad", "flip", "on_device", "device_share")
    dataset = {key: config.dataset[key] for key in kept if config.dataset.get(key) is not None}
    dataset |= {key: learned[key] for key in ("mean", "std") if key in learned}
    classes = learned.get("classes", [])
    if len(classes) != shape.classes:
        classes = [str(i) for i in range(shape.classes)]
    if len(dataset.get("mean", [])) != shape.channels:
        dataset |= {"mean": [0.5] * shape.channels, "std": [0.25] * shape.channels}
    config.dataset = {
        "_target_": "okddip.data.dataset.Dataset",
        **dataset,
        "source": {
            "_target_": "okddip.tasks.benchmark.synthetic.synthetic_source",
            "shape": [height, width, shape.channels],
            # names are no configuration: one may be written as an interpolation is
            "class_names": json.dumps(classes).replace("$", "\\u0024"),
            # whole batches: their sizes are what is measured
            "train": max(most // batch, math.ceil(shape.classes / batch)) * batch,
            "test": EVALUATION_BATCHES * config.trainer.eval_batch_size,
        },
    }
    return config


def synthetic_source(shape: Sequence[int], class_names: str, train: int, test: int) -> Source:
    """Random images of a shape, (height, width, channels); a source for `okddip.data.dataset.Dataset`.

    Args:
        shape: of an image.
        class_names: a list in JSON.
        train, test: numbers of images.
    """
    classes = json.loads(class_names)
    generator = torch.Generator().manual_seed(0)

    def split(size: int) -> Split:
        images = torch.randint(256, (size, *shape), dtype=torch.uint8, generator=generator)
        return Split(images, torch.arange(size) % len(classes))

    return Source(split(train), split(test), tuple(classes))
