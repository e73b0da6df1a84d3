"""From a config node to an object, with errors that name the key; and where the option files are."""

from __future__ import annotations

import difflib
import inspect
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig

from okddip.errors import ConfigError

# In a wheel conf/ and multirun_presets/ travel inside the package; in a checkout they stand beside it.
PACKAGE = Path(__file__).resolve().parent
CONFIG_HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent
UNKNOWN = re.compile(r"unexpected keyword argument '(\w+)'")


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
        reason = f"{type(cause).__name__}: {cause}"
        raise ConfigError(
            f"{key}: cannot be made ({reason}) with {options}.{meant(key, node, reason)} See conf/{key}."
        ) from error


def meant(key: str, node: DictConfig, reason: str) -> str:
    """A question after an option that a part does not take, where the part has one of a like name."""
    unknown = UNKNOWN.search(reason)
    if unknown is None or unknown[1] not in node:
        return ""
    others = {str(name) for name in node} - {unknown[1]}
    with suppress(Exception):  # of whatever it is
        others |= set(inspect.signature(get_object(node._target_)).parameters)
    near = difflib.get_close_matches(unknown[1], others, 1)
    return f" Did you mean {key}.{near[0]} by {key}.{unknown[1]}?" if near else ""
