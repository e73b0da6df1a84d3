"""What Hydra calls before a run or a sweep begins, and where it looks for our presets."""

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
from okddip.sweeps.grid import GridSweeper

LEAST_ROOM = 2**16  # bytes; what Hydra writes before a run begins, and more


class PresetSearchPath(SearchPathPlugin):
    """Lets Hydra find the config group `multirun_presets`, which stands beside conf/."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("okddip", f"file://{CONFIG_HOME}")


class CheckOutputFolder(Callback):
    """Refuses an output folder that cannot be written before Hydra fails on it with a stack of frames.

    Hydra logs and ignores exceptions of callbacks; this is before any job, so leaving costs no other job.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if distributed.rank() > 0:
            write_nothing(config)
        else:
            self.check("hydra.run.dir", config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if distributed.world_size() > 1:
            print(
                "A sweep does not run under torchrun: start torchrun for each run, or give the jobs a machine"
                " each with hydra/launcher=submitit_slurm.",
                file=sys.stderr,
            )
            raise SystemExit(1)
        self.check("hydra.sweep.dir", config)

    def check(self, key: str, config: DictConfig) -> None:
        HydraConfig.instance().set_config(config)  # for ${hydra:...} in the folder's name
        try:
            folder = OmegaConf.select(config, key)
        except OmegaConfBaseException as error:
            print(f"{key}: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(LEAST_ROOM))
                file.flush()
                os.fsync(file.fileno())  # some file systems find out only now that they are full
        except OSError as error:
            reason = error.strerror or str(error)
            print(
                f"{key}={folder}: the output folder cannot be written ({reason}). Name another one.",
                file=sys.stderr,
            )
            raise SystemExit(1) from None


def write_nothing(config: DictConfig) -> None:
    """Keep Hydra from making a folder and a log file on a rank that is not the first."""
    with open_dict(config), read_write(config):
        config.hydra.run.dir = "."
        config.hydra.output_subdir = None
        config.hydra.job_logging = {"version": 1, "root": {"level": "CRITICAL"}}


def register_plugins() -> None:
    """Let Hydra know our presets and our sweeper."""
    Plugins.instance().register(PresetSearchPath)
    # Hydra takes sweepers of this name space alone, where the distribution has no folder
    Plugins.instance().class_name_to_class["hydra_plugins.okddip.GridSweeper"] = GridSweeper
