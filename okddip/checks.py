"""Check a composed configuration before any part of it is built."""

from __future__ import annotations

import inspect

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from okddip.errors import ConfigError, Incompatible, check_number
from okddip.plain_data import plain

# Keys that the program itself reads, and that the command line could delete (`~optimizer.lr`)
REQUIRED_KEYS = (
    *("task", "method", "model", "dataset", "optimizer", "scheduler", "trainer", "tracking", "options"),
    *("seed", "name", "trust", "options.method", "options.model", "options.dataset", "optimizer.lr"),
    *("dataset.name", "dataset.cache_dir", "trainer.epochs", "trainer.resume", "trainer.rerun"),
)


def check(config: DictConfig) -> None:
    """Resolve the configuration, and check what its parts do not check themselves.

    Raises:
        ConfigError: an interpolation has no target, or a value is not allowed.
    """
    try:
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
    if config.trainer.rerun and config.trainer.resume is not None:
        raise ConfigError(
            f"trainer.rerun=true, trainer.resume={config.trainer.resume}: the first trains anew, the"
            " second resumes. Leave one out; to resume an interrupted sweep with trainer.rerun=true, give its"
            " command again."
        )
    check_number("seed", config.seed, minimum=0, integer=True)
    if not isinstance(config.name, str) or not config.name.strip():
        raise ConfigError(f"name={config.name}: must be text, the run's name.")


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
            " have. Choose method=okddip."
        )
