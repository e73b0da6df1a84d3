"""From a config node to an object, with errors that name the key; and where the option files are."""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

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
    check_arguments(key, node)
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
        raise ConfigError(f"{key}: cannot be made ({reason}) with {options}. See conf/{key}.") from error


def check_arguments(key: str, node: Any) -> None:
    """Refuse options that a part of the configuration does not take, before any part is made.

    Raises:
        ConfigError: names the option, and the one that is meant.
    """
    if not isinstance(node, DictConfig):
        return
    for name in node:
        if not OmegaConf.is_missing(node, name):
            check_arguments(f"{key}.{name!s}", node[name])
    try:
        taken = options_of(get_object(node._target_))
    except Exception:  # names nothing: `make` says so where it is made
        return
    if taken is None:
        return
    for name in map(str, node):
        if name not in taken and not name.startswith("_"):
            near = difflib.get_close_matches(name, taken, 1)
            raise ConfigError(
                f"{key}.{name}: is no option of {node._target_}."
                + (f" Did you mean {key}.{near[0]}?" if near else "")
                + f" See conf/{key.partition('.')[0]}."
            )


def options_of(target: Any) -> set[str] | None:
    """The arguments that a function or a class takes by name; None for any.

    A class that hands on what it does not know takes those of its base class too.
    """
    bases = (
        [base for base in inspect.getmro(target) if "__init__" in vars(base)]
        if inspect.isclass(target)
        else []
    )
    names: set[str] = set()
    for each in [vars(base)["__init__"] for base in bases] or [target]:
        parameters = inspect.signature(each).parameters.values()
        names |= {parameter.name for parameter in parameters}
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
            return names
    return None
