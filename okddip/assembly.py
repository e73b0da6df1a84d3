"""From a config node to an object, with errors that name the key; and where the option files are."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from okddip.errors import ConfigError
from okddip.text import as_override

# In a wheel conf/ and multirun_presets/ travel inside the package; in a checkout they stand beside it.
PACKAGE = Path(__file__).resolve().parent
CONFIG_HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent

PEERS = "peers"  # the key of `model` that names networks of different architectures; no model takes it
NETWORKS = "networks"  # beside it, what those options hold


def make(key: str, node: DictConfig, **arguments: Any) -> Any:
    """Instantiate a part of the configuration.

    Raises:
        ConfigError: the part's own, or one that names the group and the options it did not take.
    """
    group = key.partition(".")[0]
    if not isinstance(node, DictConfig) or not isinstance(node.get("_target_"), str):
        raise ConfigError(f"{key}._target_: names what is to be made, and is not there. See conf/{group}.")
    if key == "model" and PEERS in node:
        node = copy.copy(node)
        with open_dict(node):
            del node[PEERS]
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
        raise ConfigError(f"{key}: cannot be made ({reason}) with {options}. See conf/{group}.") from error


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


def compose_networks(config: DictConfig) -> None:
    """Put what the options named by `model.peers` hold into `model.networks`, in place of the one model.

    Does nothing where `model.peers` is null, or where this is done already.

    Raises:
        ConfigError: it is no list of options of the group `model`, or of fewer than two.
    """
    names = OmegaConf.select(config, f"model.{PEERS}")
    if names is None or NETWORKS in config.model:
        return
    here = (
        f"model.{PEERS}={as_override(OmegaConf.to_container(names) if OmegaConf.is_config(names) else names)}"
    )
    if not isinstance(names, ListConfig) or len(names) < 2:
        raise ConfigError(
            f"{here}: must be a list of two or more options of conf/model, one for each peer,"
            " such as [resnet20,resnet32]. For peers of one architecture use model=NAME method.peers=N."
        )
    known = GlobalHydra.instance().config_loader().get_group_options("model")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise ConfigError(
                f"{here}: {name} is no option of conf/model."
                + (f" Did you mean {near[0]}?" if near else "")
                + f" There are {', '.join(known)}."
            )
    options = {name: OmegaConf.to_container(compose(f"model/{name}").model) for name in dict.fromkeys(names)}
    with open_dict(config):
        config.model = {PEERS: list(names), NETWORKS: [options[name] for name in names]}


def backbone_factories(model: DictConfig, **shape: int) -> list[Callable[[], Any]]:
    """What makes the networks that the part `model` of a configuration describes.

    Args:
        model: with `model.networks`, if its peers differ.
        shape: `num_classes` and `in_channels`.

    Returns:
        One for all peers, or one for each where they differ.
    """
    if model.get(PEERS) is None:
        return [partial(make, "model", model, **shape)]
    return [
        partial(make, f"model.{NETWORKS}.{index}", node, **shape)
        for index, node in enumerate(model[NETWORKS])
    ]


def name_of_models(peers: Any, option: str) -> str:
    """What a group of networks is called: its model, or where peers differ all of theirs.

    >>> name_of_models(["resnet20", "resnet20", "wrn20_8"], "resnet32")
    '2xresnet20+wrn20_8'
    """
    if not isinstance(peers, list | ListConfig):
        return option
    runs = [(str(name), len(list(equal))) for name, equal in groupby(peers)]
    return "+".join(name if count == 1 else f"{count}x{name}" for name, count in runs)
