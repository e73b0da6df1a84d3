"""Data sets as the options of the config group make them."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from okddip.data.dataset import Dataset, channel_statistics
from okddip.data.options import check_options
from okddip.data.sources import Source, Split
from okddip.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf"
OPTIONS = sorted(path.stem for path in (CONF / "dataset").glob("*.yaml"))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str) -> DictConfig:
    return compose("config", overrides=list(overrides)).dataset


def source(classes: int = 2, images: int = 40, channels: int = 3) -> Source:
    generator = torch.Generator().manual_seed(0)
    splits = [
        Split(
            torch.randint(256, (count, 8, 6, channels), dtype=torch.uint8, generator=generator),
            torch.arange(count) % classes,
        )
        for count in (images, images // 2)
    ]
    return Source(splits[0], splits[1], tuple(f"class{i}" for i in range(classes)))


# The options


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_passes_the_checks_and_has_the_keys_of_its_class(option: str) -> None:
    config = composed(f"dataset={option}", "dataset.root=somewhere")
    check_options(config)
    parameters = inspect.signature(get_object(config._target_)).parameters
    assert {str(key) for key in config} - {"_target_"} <= set(parameters)
    if "source" in config:
        parameters = inspect.signature(get_object(config.source._target_)).parameters
        assert {str(key) for key in config.source} - {"_target_"} <= set(parameters)


@pytest.mark.parametrize("option", ["image_folder", "imagenet"])
def test_a_folder_must_be_named(option: str) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.root=None: .* add dataset\.root=PATH"):
        check_options(composed(f"dataset={option}"))


def test_digits_come_from_their_option() -> None:
    dataset = instantiate(composed("dataset=digits"))
    assert dataset.name == "digits"
    assert dataset.sizes == {"train": 1438, "test": 359}
    assert dataset.image_size == (16, 16)
    assert dataset.channels == 1
    assert dataset.classes == tuple("0123456789")
    images, labels = next(dataset.train_loader(64, CPU, seed=0).batches(0))
    assert images.shape == (64, 1, 16, 16)
    assert labels.shape == (64,)


def test_an_image_size_goes_through_to_the_source() -> None:
    assert instantiate(composed("dataset=digits", "dataset.image_size=[12,20]")).image_size == (12, 20)
    assert instantiate(composed("dataset=digits", "dataset.image_size=null")).image_size == (8, 8)


def users_source(brightness: int) -> Source:
    images = torch.full((4, 8, 8, 3), brightness, dtype=torch.uint8)
    images[0] = 0
    return Source(Split(images, torch.arange(4) % 2), Split(images, torch.arange(4) % 2), ("a", "b"))


def test_a_source_of_ones_own_needs_its_target_only() -> None:
    own = {"name": "mine", "source": {"_target_": f"{__name__}.users_source", "brightness": 10}}
    common = {key: value for key, value in composed("dataset=digits").items() if key not in ("image_size",)}
    dataset = instantiate(OmegaConf.create(common | own | {"mean": None, "std": None}))
    assert dataset.sizes == {"train": 4, "test": 4}
    assert dataset.classes == ("a", "b")


# Splits and statistics


def test_parts_of_the_training_set_are_fixed_and_leave_the_test_set_alone() -> None:
    whole = Dataset(name="x", source=source())
    part = Dataset(name="x", source=source(), train_size=10, validation=0.25)
    assert whole.sizes == {"train": 40, "test": 20}
    assert part.sizes == {"train": 10, "test": 20, "val": 10}
    assert part.splits["val"].labels.bincount().tolist() == [5, 5]
    assert part.splits["train"].labels.bincount().tolist() == [5, 5]
    assert torch.equal(part.splits["test"].images, whole.splits["test"].images)
    again = Dataset(name="x", source=source(), train_size=10, validation=0.25)
    assert torch.equal(part.splits["train"].images, again.splits["train"].images)


def test_each_split_can_be_evaluated() -> None:
    dataset = Dataset(name="x", source=source(), validation=0.25)
    for split, size in dataset.sizes.items():
        loader = dataset.eval_loader(split, 7, CPU)
        assert loader.size == size
        assert sum(len(labels) for _, labels in loader.batches()) == size
    with pytest.raises(ConfigError, match="split=valid: must be one of train, test, val"):
        dataset.eval_loader("valid", 7, CPU)


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_are_those_of_the_pixels(channels: int) -> None:
    images = source(channels=channels).train.images
    mean, std = channel_statistics(images)
    pixels = images.numpy().reshape(-1, channels) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=0))
    np.testing.assert_allclose(std, pixels.std(axis=0))


def test_missing_statistics_are_computed_from_the_training_images() -> None:
    dataset = Dataset(name="x", source=source(), pad=0, flip=False)
    images = torch.cat([images for images, _ in dataset.train_loader(16, CPU, seed=0).batches(0)])
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


# What is refused


def with_train(**change: Any) -> Source:
    good = source()
    return good._replace(train=good.train._replace(**change))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (with_train(labels=torch.arange(40) % 3), "train split: label 2 is outside the range 0 to 1"),
        (with_train(labels=torch.arange(40) % 2 - 1), "train split: label -1 is outside the range"),
        (with_train(labels=torch.zeros(39, dtype=torch.int64)), "40 images and 39 labels"),
        (with_train(images=torch.zeros(40, 8, 6, 3)), "must be uint8"),
        (with_train(images=torch.zeros(40, 8, 6, dtype=torch.uint8)), r"must be uint8 \[N, H, W, C\]"),
        (
            with_train(images=torch.zeros(40, 8, 8, 3, dtype=torch.uint8)),
            r"test split: images are \[8, 6, 3\]",
        ),
        (source(images=0), "0 images and 0 labels"),
    ],
)
def test_a_source_that_breaks_its_promise_is_refused(bad: Source, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"dataset x, .*{message}"):
        Dataset(name="x", source=bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_size": 41}, "dataset.train_size=41: the training set has 40 images"),
        ({"validation": 1.5}, "dataset.validation=1.5"),
        ({"pad": -1}, "dataset.pad=-1"),
        ({"image_size": 16}, "dataset.image_size=16: the images of x are 8x6 and are not scaled"),
        ({"mean": [0.5], "std": [0.5]}, "the images of x have 3 channels"),
        ({"mean": [0.5]}, r"dataset.mean=\[0.5\], dataset.std=None: give both"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Dataset(name="x", source=source(), **options)


def test_a_channel_without_contrast_is_refused() -> None:
    with pytest.raises(ConfigError, match="same value in all training images"):
        Dataset(name="x", source=with_train(images=torch.zeros(40, 8, 6, 3, dtype=torch.uint8)))


# Where the images are kept


class Cuda:
    type = "cuda"


@pytest.mark.parametrize(
    ("on_device", "share", "expected"),
    [("auto", 0.5, True), ("auto", 0.01, False), (True, 0.01, True), (False, 0.5, False)],
)
def test_images_are_kept_on_a_gpu_if_they_take_a_small_enough_share(
    on_device: str | bool, share: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset(name="x", source=source(), on_device=on_device, device_share=share)
    size = 60 * 8 * 6 * 3
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * size, 100 * size))
    assert dataset._fits(torch.device("cuda")) is expected
    # the other splits go where the first went, which has taken memory
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size // 2, 100 * size))
    assert dataset._fits(torch.device("cuda")) is expected
