"""Checks of a data set's options that need neither its data nor torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from okddip.errors import ConfigError, check_choice, check_number


def check_options(options: Mapping[str, Any]) -> None:
    """Check the values of the config group `dataset`, before anything is read.

    Args:
        options: the group as composed; only the keys it has are checked, so that a user's own data set
            does not need all of them.

    Raises:
        ConfigError: names the key, the value found and what is allowed.
    """
    if isinstance(options, DictConfig):
        for key in map(str, options):
            if OmegaConf.is_missing(options, key):
                raise ConfigError(f"dataset.{key} is not given: add dataset.{key}=... to the command.")
    for key, check in _CHECKS.items():
        if key in options:
            check(f"dataset.{key}", options[key])
    mean, std = options.get("mean"), options.get("std")
    if (mean is None) != (std is None):
        raise ConfigError(f"dataset.mean={mean}, dataset.std={std}: give both, or null for both.")
    if mean is not None and std is not None and len(mean) != len(std):
        raise ConfigError(f"dataset.mean={mean}, dataset.std={std}: one number a channel in each.")


def image_shape(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """(height, width) of the option `image_size`: a number means a square, None that it is not given."""
    if image_size is None or isinstance(image_size, int):
        return None if image_size is None else (image_size, image_size)
    height, width = image_size
    return height, width


def _folder(key: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key}={value}: must be the path of a folder; add {key}=PATH to the command.")


def _train_size(key: str, value: Any) -> None:
    if value is not None:
        check_number(key, value, minimum=1, integer=True)


def _validation(key: str, value: Any) -> None:
    check_number(key, value, minimum=0, below=1)


def _pad(key: str, value: Any) -> None:
    if value is not None:
        check_number(key, value, minimum=0, integer=True)


def _switch(key: str, value: Any) -> None:
    check_choice(key, value, (True, False))


def _on_device(key: str, value: Any) -> None:
    check_choice(key, value, ("auto", True, False))


def _share(key: str, value: Any) -> None:
    check_number(key, value, above=0, maximum=1)


def _image_size(key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise ConfigError(f"{key}={value}: must be one number, or [height, width].")
        for number in value:
            check_number(key, number, minimum=1, integer=True)
    else:
        check_number(key, value, minimum=1, integer=True)


def _channels(key: str, value: Any) -> None:
    check_choice(key, value, (1, 3))


def _mean(key: str, value: Any) -> None:
    _channel_values(key, value, minimum=0, maximum=1)


def _std(key: str, value: Any) -> None:
    _channel_values(key, value, above=0, maximum=1)


def _channel_values(key: str, value: Any, **bounds: float) -> None:
    if value is None:
        return
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ConfigError(f"{key}={value}: must be a list with one number a channel, or null.")
    for number in value:
        check_number(key, number, **bounds)  # type: ignore[arg-type]


def _bad_images(key: str, value: Any) -> None:
    check_choice(key, value, ("refuse", "skip"))


def _count(key: str, value: Any) -> None:
    check_number(key, value, minimum=0, integer=True)


def _pixels(key: str, value: Any) -> None:
    check_number(key, value, minimum=1, integer=True)


_CHECKS = {
    "root": _folder,
    "cache_dir": _folder,
    "train_size": _train_size,
    "validation": _validation,
    "pad": _pad,
    "flip": _switch,
    "on_device": _on_device,
    "device_share": _share,
    "image_size": _image_size,
    "channels": _channels,
    "mean": _mean,
    "std": _std,
    "bad_images": _bad_images,
    "workers": _count,
    "resize": _pixels,
}
