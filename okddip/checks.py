"""Check a composed configuration before any part of it is built."""

from __future__ import annotations

import inspect
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from okddip.assembly import NETWORKS, PEERS, compose_networks
from okddip.errors import ConfigError, Incompatible, check_number
from okddip.keys import check_keys
from okddip.plain_data import plain
from okddip.tracking.params import as_param

# Keys that the program itself reads, and that the command line could delete (`~optimizer.lr`)
REQUIRED_KEYS = (
    *("task", "method", "model", "dataset", "optimizer", "scheduler", "trainer", "tracking", "options"),
    *("seed", "name", "trust", "options.method", "options.model", "options.dataset", "optimizer.lr"),
    *("dataset.name", "dataset.cache_dir", "trainer.epochs", "trainer.resume", "trainer.rerun"),
)


def check(config: DictConfig) -> None:
    """Resolve the configuration, and check what its parts do not check themselves.

    Raises:
        ConfigError: an interpolation has no target, nothing reads a key, or a value is not allowed.
    """
    try:
        check_keys(config, HydraConfig.get())  # reads values, which may refer to what is not there
        check_model_settings(config)
        compose_networks(config)
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from None
    if missing := OmegaConf.missing_keys(config):
        keys = ", ".join(sorted(missing))
        raise ConfigError(f"{keys}: not given. Add {sorted(missing)[0]}=... to the command.")
    # an escaped \\${...} would be an interpolation when the configuration is read again
    plain(OmegaConf.to_container(config), "", "configuration")
    for key in REQUIRED_KEYS:
        parent, _, name = key.rpartition(".")
        section = OmegaConf.select(config, parent) if parent else config
        if not isinstance(section, DictConfig) or name not in section:
            raise ConfigError(f"{key}: is not in the configuration, and every run needs it.")
    check_ablation(config)
    check_peers(config)
    if config.trainer.rerun and config.trainer.resume is not None:
        raise ConfigError(
            f"trainer.rerun=true, trainer.resume={config.trainer.resume}: the first trains anew, the"
            " second resumes. Leave one out; to resume an interrupted sweep with trainer.rerun=true, give its"
            " command again."
        )
    check_number("seed", config.seed, minimum=0, integer=True)
    if not isinstance(config.name, str) or not config.name.strip():
        raise ConfigError(f"name={config.name}: must be text, the run's name.")


def check_model_settings(config: DictConfig) -> None:
    """Refuse settings of a model that stand beside `model.peers`, where nothing would read them.

    Raises:
        ConfigError: names the setting.
    """
    names = OmegaConf.select(config, f"model.{PEERS}")
    if not isinstance(names, ListConfig) or NETWORKS in config.model:
        return
    here = f"model.{PEERS}={as_param(OmegaConf.to_container(names))}"
    settings = compose(f"model/{HydraConfig.get().runtime.choices['model']}").model
    for key in {**config.model, **settings}:
        value = config.model.get(key)
        if key != PEERS and value != settings.get(key):
            raise ConfigError(
                f"model.{key!s}={value}: is not read beside {here}, which names the model of each"
                " peer. Leave one of the two out; for other settings of a model write an option file of your"
                " own in the group model."
            )


def check_ablation(config: DictConfig) -> None:
    """Check that the method has the switches that an option of the group `ablation` sets.

    Raises:
        Incompatible: it does not.
    """
    hydra = HydraConfig.get()
    if (ablation := hydra.runtime.choices.get("ablation")) is None:
        return
    try:
        method = get_object(config.method._target_)
        constructors = method.__mro__ if isinstance(method, type) else [method]
        parameters = {
            name for constructor in constructors for name in inspect.signature(constructor).parameters
        }
    except Exception:
        return  # building the method raises the error
    added = {key.partition("=")[0] for key in hydra.overrides.task if key.startswith("+")}
    unknown = [key for key in config.method if key not in parameters and not str(key).startswith("_")]
    if unknown and f"+method.{unknown[0]}" not in added:
        raise Incompatible(
            f"ablation={ablation}: sets method.{unknown[0]}, which method={config.options.method} does not"
            " have. Choose a method with that setting."
        )


def target_of(node: DictConfig) -> Any:
    """The class or function that a part's `_target_` names; None if there is none, as `make` says then."""
    try:
        return get_object(node._target_)
    except Exception:
        return None


def check_peers(config: DictConfig) -> None:
    """See that nothing contradicts the networks that `model.peers` names, where it names any.

    Raises:
        ConfigError: another model is chosen beside them.
        Incompatible: there are more or fewer peers, or they are to share a trunk.
    """
    names = config.model.get(PEERS)
    if names is None:
        return
    here = f"model.{PEERS}={as_param(OmegaConf.to_container(names))}"
    for override in HydraConfig.get().overrides.task:
        key = override.lstrip("+~").partition("=")[0]
        if key == "model":
            raise ConfigError(
                f"{override}: is not read beside {here}, which names the model of each peer. Leave one of the"
                " two out."
            )
    method, option = target_of(config.method), f"method={config.options.method}"
    if "network" in getattr(method, "refused_structures", {}):
        raise Incompatible(
            f"{option}: its peers share a trunk, and networks of different architectures, as {here} names"
            " them, share none. Choose another method, or one model for all peers."
        )
    most = getattr(method, "most_peers", None)
    if most is not None and len(names) > most:
        raise Incompatible(
            f"{option}: trains {most} network, and {here} names {len(names)}. Choose model=NAME."
        )
    if config.method.get("peers") != len(names):
        raise Incompatible(
            f"method.peers={config.method.get('peers')}: {here} names {len(names)} networks. Set"
            f" method.peers={len(names)}."
        )
    if config.method.get("structure") != "network":
        raise Incompatible(
            f"method.structure={config.method.get('structure')}: networks of different architectures share no"
            f" trunk, and {here} names such. Set method.structure=network, or take one model for all peers."
        )
