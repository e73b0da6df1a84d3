"""The images that a checkpoint is measured on, which may be others than its own."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from okddip.assembly import make
from okddip.data.dataset import check_source
from okddip.data.evaluation_images import class_indices
from okddip.data.sources import Source, Split
from okddip.errors import ConfigError
from okddip.text import composed, listed

log = logging.getLogger(__name__)

IN_MEMORY = "okddip.data.dataset.Dataset"
STREAMED = "okddip.data.streaming.StreamingDataset"
IMAGE_FOLDER = "okddip.data.sources.image_folder"


def other_images(node: DictConfig, state: dict[str, Any]) -> Any:
    """The test images of a data set other than the checkpoint's own; of a folder no others are read.

    Their classes may be some of the network's, in any order, and are found by name. A user's own class of
    data sets is made as it is.

    Args:
        node: `dataset` of the configuration.
        state: the checkpoint.

    Raises:
        ConfigError: the images have classes that the network does not know, or other channels.
    """
    if node.get("_target_") not in (IN_MEMORY, STREAMED):
        return make("dataset", node)
    options: dict[str, Any] = {"mean": state["mean"], "std": state["std"]}
    if node._target_ == STREAMED:
        check_channels(3, state, node.name)
        return make("dataset", node, _partial_=True)(**options, classes=state["classes"])
    node = node.copy()
    OmegaConf.set_struct(node, False)
    source = node.pop("source")
    if source.get("_target_") == IMAGE_FOLDER:
        check_channels(source.get("channels", 3), state, node.name)
        source = make("dataset.source", source, _partial_=True)(classes=state["classes"])
    else:
        source = without_training_images(make("dataset.source", source), state["classes"], node.name)
        check_channels(source.test.images.shape[-1], state, node.name)
    return make("dataset", node, _partial_=True)(**options, source=source)


def without_training_images(source: Source, classes: Sequence[str], name: str) -> Source:
    """The test images of a data set, with labels that count in the classes of a network.

    Raises:
        ConfigError: it has classes that the network does not know.
    """
    check_source(name, source)
    indices = torch.from_numpy(class_indices(source.classes, classes, f"dataset={name}"))
    test = Split(source.test.images, indices[source.test.labels])
    return Source(None, test, tuple(classes), source.test_files)


def check_channels(channels: int, state: dict[str, Any], name: str) -> None:
    """Refuse images that have other channels than the network takes.

    Raises:
        ConfigError: names both.
    """
    if channels != state["channels"]:
        raise ConfigError(
            f"dataset={name}: has image channels {channels}, and the checkpoint was trained on"
            f" dataset={state['config']['options']['dataset']} with image channels {state['channels']}."
            " Choose images with the same (dataset=image_folder reads them as either:"
            f" dataset.source.channels={state['channels']}), or leave dataset out for the checkpoint's own."
        )


def check_images(settings: DictConfig, state: dict[str, Any], dataset: Any) -> None:
    """Refuse a data set whose classes or channels are not those of the checkpoint; warn of another size.

    Raises:
        ConfigError: names both.
    """
    theirs, ours = composed(state["classes"]), composed(dataset.classes)
    if theirs != ours:
        raise ConfigError(
            f"dataset={settings.options.dataset}: has classes {listed(ours)}, and the checkpoint was trained"
            f" on dataset={state['config']['options']['dataset']} with classes {listed(theirs)}. Choose a"
            " data set with the same ones, or leave dataset out for the checkpoint's own."
        )
    check_channels(dataset.channels, state, settings.options.dataset)
    if list(dataset.image_size) != state["image_size"]:
        log.warning(
            "The network was trained on images of %dx%d and is measured on images of %dx%d.",
            *state["image_size"],
            *dataset.image_size,
        )


def name_absent_classes(dataset: Any) -> None:
    """Say in one line which classes have no test image, if some have none."""
    if not (splits := getattr(dataset, "splits", {})):  # of a user's own data set
        return
    present = set(np.unique(np.asarray(splits["test"].labels)).tolist())
    if absent := [name for number, name in enumerate(dataset.classes) if number not in present]:
        log.info(
            "classes    %s of the checkpoint's %s have images here, matched by name; none of: %s",
            *(f"{len(present):,}", f"{len(dataset.classes):,}", listed(absent, 5)),
        )
