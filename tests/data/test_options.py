"""Checks of options before any data is read."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from okddip.data.options import check_options, image_shape
from okddip.errors import ConfigError

GOOD = {
    "name": "x",
    "root": "data",
    "cache_dir": "~/.cache",
    "train_size": None,
    "validation": 0,
    "image_size": None,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "pad": 4,
    "flip": True,
    "on_device": "auto",
    "device_share": 0.25,
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"train_size": 1},
        {"validation": 0.1},
        {"pad": 0},
        {"image_size": 32},
        {"image_size": [32, 48]},
        {"mean": None, "std": None},
        {"on_device": True},
        {"device_share": 1},
        {"something_of_a_users_own": object},
    ],
)
def test_good_options_pass(change: dict[str, Any]) -> None:
    check_options(GOOD | change)
    if "something_of_a_users_own" not in change:
        check_options(OmegaConf.create(GOOD | change))


@pytest.mark.parametrize(
    "change",
    [
        {"root": ""},
        {"root": 7},
        {"cache_dir": None},
        {"train_size": 0},
        {"train_size": 0.5},
        {"train_size": "all"},
        {"validation": 1},
        {"validation": -0.1},
        {"validation": "yes"},
        {"pad": -1},
        {"pad": 1.5},
        {"flip": 1},
        {"flip": "maybe"},
        {"on_device": "sometimes"},
        {"on_device": 1},
        {"device_share": 0},
        {"device_share": 1.1},
        {"image_size": 0},
        {"image_size": "large"},
        {"image_size": [32]},
        {"image_size": [32, -1]},
        {"mean": 0.5},
        {"mean": []},
        {"mean": [0.5, 0.5, 128]},
        {"mean": ["x", 0.5, 0.5]},
        {"std": [0.2, 0.2, 0]},
        {"std": "wide"},
        {"channels": 4},
        {"bad_images": "ignore"},
        {"workers": -1},
        {"resize": 0},
    ],
)
def test_a_bad_option_is_refused_by_its_name(change: dict[str, Any]) -> None:
    (key,) = change
    with pytest.raises(ConfigError, match=rf"^dataset\.{key}="):
        check_options(OmegaConf.create(GOOD | change))


@pytest.mark.parametrize("change", [{"mean": None}, {"std": None}, {"mean": [0.5]}])
def test_mean_and_std_belong_together(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.mean=.*dataset\.std="):
        check_options(GOOD | change)


def test_an_option_that_must_be_given_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.root is not given: add dataset\.root="):
        check_options(OmegaConf.create(GOOD | {"root": "???"}))


def test_one_number_means_a_square() -> None:
    assert image_shape(None) is None
    assert image_shape(16) == (16, 16)
    assert image_shape(OmegaConf.create([16, 20])) == (16, 20)
