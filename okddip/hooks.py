"""Plugins of Hydra: a check before a run or a sweep, the search path of presets, the sweeper."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from okddip import distributed
from okddip.assembly import CONFIG_HOME
from okddip.errors import ConfigError
from okddip.sweeps.grid import GridSweeper

MINIMUM_SPACE = 2**16  # bytes; more than Hydra writes before a run begins


class PresetSearchPath(SearchPathPlugin):
    """Lets Hydra find the config group `multirun_presets`, which stands beside conf/."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("okddip", f"file://{CONFIG_HOME}")


class CheckOutputFolder(Callback):
    """Refuses an output folder that cannot be written, for which Hydra would print a traceback.

    Hydra logs and ignores exceptions of callbacks, so this exits; no job has begun yet.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if distributed.rank() > 0:
            disable_output(config)
        else:
            exit_if_refused("hydra.run.dir", config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if distributed.world_size() > 1:
            print(
                "A sweep does not run under torchrun: start torchrun for each run, or run each job on a"
                " machine of its own with hydra/launcher=submitit_slurm.",
                file=sys.stderr,
            )
            raise SystemExit(1)
        exit_if_refused("hydra.sweep.dir", config)


def exit_if_refused(key: str, config: DictConfig) -> None:
    try:
        check_output_folder(key, config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None


def check_output_folder(key: str, config: DictConfig) -> None:
    """Make the output folder that a key of Hydra's names, and see that files can be written there.

    Raises:
        ConfigError: they cannot.
    """
    HydraConfig.instance().set_config(config)  # for ${hydra:...} in the folder's name
    try:
        folder = OmegaConf.select(config, key)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {error}") from None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(MINIMUM_SPACE))
            file.flush()
            os.fsync(file.fileno())  # some file systems report only now that they are full
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"{key}={folder}: the output folder cannot be written ({reason}). Name another one."
        ) from None


def disable_output(config: DictConfig) -> None:
    """Keep Hydra from making a folder and a log file, on ranks other than 0."""
    with open_dict(config), read_write(config):
        config.hydra.run.dir = "."
        config.hydra.output_subdir = None
        config.hydra.job_logging = {"version": 1, "root": {"level": "CRITICAL"}}


def register_plugins() -> None:
    """Register our presets and our sweeper with Hydra."""
    Plugins.instance().register(PresetSearchPath)
    # Hydra accepts sweepers of this namespace only, and the distribution has no folder for it
    Plugins.instance().class_name_to_class["hydra_plugins.okddip.GridSweeper"] = GridSweeper
