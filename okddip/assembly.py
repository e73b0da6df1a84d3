"""From a config node to an object, with errors that name the key; and where the option files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from okddip.errors import ConfigError

# In a wheel conf/ and multirun_presets/ travel inside the package; in a checkout they stand beside it.
PACKAGE = Path(__file__).resolve().parent
CONFIG_HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent


def make(key: str, node: DictConfig, **arguments: Any) -> Any:
    """Instantiate a part of the configuration.

    Raises:
        ConfigError: the part's own, or one that names the group and the options it did not take.
    """
    if not isinstance(node, DictConfig) or not isinstance(node.get("_target_"), str):
        raise ConfigError(f"{key}._target_: names what is to be made, and is not there. See conf/{key}.")
    try:
        return instantiate(node, **arguments)
    except Exception as error:  # not all of Hydra's own are HydraExceptions
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__
        if isinstance(cause, ConfigError):
            raise cause from None
        options = ", ".join(f"{name!s}={value}" for name, value in node.items())
        raise ConfigError(
            f"{key}: cannot be made ({type(cause).__name__}: {cause}) with {options}. See conf/{key}."
        ) from error
