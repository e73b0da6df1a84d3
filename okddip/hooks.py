"""What Hydra is told of: a check of folders, where presets are, the sweeper, a resolver, our messages."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from okddip import distributed
from okddip.assembly import CONFIG_HOME, name_of_models
from okddip.errors import ConfigError
from okddip.files import remove_unused
from okddip.keys import explain_composition
from okddip.sweeps.grid import GridSweeper
from okddip.version import __version__

MINIMUM_SPACE = 2**16  # bytes; more than Hydra writes before a run begins
FULL_ERROR = "HYDRA_FULL_ERROR"  # the variable that keeps Hydra from shortening stack traces


class PresetSearchPath(SearchPathPlugin):
    """Lets Hydra find the config group `multirun_presets`, which stands beside conf/."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("okddip", f"file://{CONFIG_HOME}")


class CheckOutputFolder(Callback):
    """Refuses an output folder that cannot be written, for which Hydra would print a traceback.

    And removes that of a command that was refused. Hydra logs and ignores exceptions of callbacks, so this
    exits; no job has begun yet.
    """

    def __init__(self) -> None:
        self.made: list[Path] = []  # the folder of the run and those around it that were not there before

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if distributed.rank() > 0:
            disable_output(config)
            return
        task = config.hydra.runtime.choices.get("task")
        print(
            f"okddip {__version__}, task={task}: loading PyTorch and MLflow...", file=sys.stderr, flush=True
        )
        self.made = exit_if_refused("hydra.run.dir", config)

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        error = kwargs["job_return"]._return_value
        if isinstance(error, ConfigError):
            remove_unused(self.made)
            print(error, file=sys.stderr)  # here, as Hydra would print the overrides before it
            raise SystemExit(1) from error

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if distributed.world_size() > 1:
            print(
                "A sweep does not run under torchrun: start torchrun for each run, or run each job on a"
                " machine of its own with hydra/launcher=submitit_slurm.",
                file=sys.stderr,
            )
            raise SystemExit(1)
        exit_if_refused("hydra.sweep.dir", config)


def exit_if_refused(key: str, config: DictConfig) -> list[Path]:
    try:
        return check_output_folder(key, config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None


def check_output_folder(key: str, config: DictConfig) -> list[Path]:
    """Make the output folder that a key of Hydra's names, and see that files can be written there.

    Where there is a run in it already, `.hydra` stays what it was: of the command that began that run.

    Returns:
        The folders that were not there before, the innermost first.

    Raises:
        ConfigError: they cannot.
    """
    HydraConfig.instance().set_config(config)  # for ${hydra:...} in the folder's name
    try:
        folder = OmegaConf.select(config, key)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {error}") from None
    absolute = Path(folder).absolute()
    try:
        made = [each for each in (absolute, *absolute.parents) if not each.exists()]
        absolute.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(MINIMUM_SPACE))
            file.flush()
            os.fsync(file.fileno())  # some file systems report only now that they are full
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"{key}={folder}: the output folder cannot be written ({reason}). Name another one."
        ) from None
    if key == "hydra.run.dir" and (absolute / "last.pt").exists():
        with read_write(config.hydra):
            config.hydra.output_subdir = None
    return made


def disable_output(config: DictConfig) -> None:
    """Keep Hydra from making a folder and a log file, on ranks other than 0."""
    with open_dict(config), read_write(config):
        config.hydra.run.dir = "."
        config.hydra.output_subdir = None
        # loggers that exist would fall silent, and rank 0 could not repeat what they warn of
        config.hydra.job_logging = {
            "version": 1,
            "disable_existing_loggers": False,
            "root": {"level": "CRITICAL"},
        }


@contextmanager
def short_errors() -> Iterator[None]:
    """Print errors of Hydra's and of ours as their message alone, and others from our own code on.

    Hydra would add how to get a stack trace, which nobody needs for a typing error.
    """
    if FULL_ERROR in os.environ:
        yield
        return
    os.environ[FULL_ERROR] = "1"  # lets them through to here
    try:
        yield
    except CompactHydraException as error:
        cause = error.__cause__
        print(
            error, *([cause] if isinstance(cause, OmegaConfBaseException) else ()), sep="\n", file=sys.stderr
        )
        sys.exit(1)
    except Exception as error:
        frames = [trace for trace in traces_of(error) if trace.tb_frame.f_code.co_name == "run_job"]
        traceback.print_exception(error.with_traceback(frames[-1].tb_next if frames else error.__traceback__))
        sys.exit(1)
    finally:
        del os.environ[FULL_ERROR]


def traces_of(error: Exception) -> Iterator[TracebackType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace
        trace = trace.tb_next


def register_plugins() -> None:
    """Register with Hydra our presets, our sweeper, what `options.model` is, and what is said of keys."""
    explain_composition()
    OmegaConf.register_new_resolver("name_of_models", name_of_models, replace=True)
    Plugins.instance().register(PresetSearchPath)
    # Hydra accepts sweepers of this namespace only, and the distribution has no folder for it
    Plugins.instance().class_name_to_class["hydra_plugins.okddip.GridSweeper"] = GridSweeper
