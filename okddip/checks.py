"""What is wrong with a composed configuration, said before any part of it is built."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from okddip.errors import ConfigError, Incompatible, check_number
from okddip.plain_data import plain

if TYPE_CHECKING:
    pass

# Keys that the program itself reads, and that can be deleted (`~optimizer.lr`)
READ = (
    *("task", "method", "model", "dataset", "optimizer", "scheduler", "trainer", "tracking", "options"),
    *("seed", "name", "trust", "options.method", "options.model", "options.dataset", "optimizer.lr"),
    *("dataset.name", "dataset.cache_dir", "trainer.epochs", "trainer.resume", "trainer.rerun"),
)


def check(config: DictConfig) -> None:
    """Resolve the configuration, and check what no part of it checks itself.

    Raises:
        ConfigError: an interpolation leads nowhere, or a value is not allowed.
    """
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from None
    if missing := OmegaConf.missing_keys(config):
        keys = ", ".join(sorted(missing))
        raise ConfigError(f"{keys}: not given. Add {sorted(missing)[0]}=... to the command.")
    # what was written as \\${...} is one interpolation more when it is read again
    plain(OmegaConf.to_container(config), "", "configuration")
    for key in READ:
        parent, _, name = key.rpartition(".")
        section = OmegaConf.select(config, parent) if parent else config
        if not isinstance(section, DictConfig) or name not in section:
            raise ConfigError(f"{key}: is not in the configuration, and no run does without it.")
    check_ablation(config)
    if config.trainer.rerun and config.trainer.resume is not None:
        raise ConfigError(
            f"trainer.rerun=true, trainer.resume={config.trainer.resume}: the one trains anew, the other goes"
            " on. Leave one out; a sweep with trainer.rerun=true that was cut off goes on when given again."
        )
    check_number("seed", config.seed, minimum=0, integer=True)
    if not isinstance(config.name, str) or not config.name.strip():
        raise ConfigError(f"name={config.name}: must be text, the run's name.")


def check_ablation(config: DictConfig) -> None:
    """See that the method has the switches that an option of the group `ablation` sets.

    Raises:
        Incompatible: it has not.
    """
    known = HydraConfig.get()
    if (ablation := known.runtime.choices.get("ablation")) is None:
        return
    try:
        method = get_object(config.method._target_)
        makers = method.__mro__ if isinstance(method, type) else [method]
        taken = {name for maker in makers for name in inspect.signature(maker).parameters}
    except Exception:
        return  # the method cannot be made, and says so itself
    added = {key.partition("=")[0] for key in known.overrides.task if key.startswith("+")}
    strange = [key for key in config.method if key not in taken and not str(key).startswith("_")]
    if strange and f"+method.{strange[0]}" not in added:
        raise Incompatible(
            f"ablation={ablation}: sets method.{strange[0]}, which method={config.options.method} has not."
            " Choose method=okddip."
        )
