"""The beginning of a sweep, in a callback of Hydra.

Its end is in the console command (`finish`), since Hydra calls no callback at the end of a sweep that fails.
Between the two, jobs run in this process, in joblib's or on a cluster.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from okddip.errors import ConfigError
from okddip.sweeps.environment import START, SweepInfo, announce_jobs, is_training
from okddip.sweeps.parent import open_parent_run, sweep_overrides
from okddip.sweeps.sweep import Sweep
from okddip.text import for_terminal

GRID = "hydra_plugins.okddip.GridSweeper"
# They list all jobs with all overrides; here each says its name when it begins
LAUNCHERS = ("hydra._internal.core_plugins.basic_launcher", "hydra_plugins.hydra_joblib_launcher._core")
NO_CHDIR = (
    "hydra.job.chdir=true: would move each run to a working directory of its own, and with it relative paths"
    " and a relative tracking.uri. Leave it out; a run's files are in its output folder in any case."
)


class BeginSweep(Callback):
    """Begins a sweep. Hydra ignores exceptions of callbacks, but not SystemExit."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            refuse_senseless_sweep(config)
            Sweep.current = sweep = begin_sweep(config)
            print(f"Sweep {for_terminal(sweep.name)}: composing its jobs...", file=sys.stderr, flush=True)
            sweep.lock()
            for name in LAUNCHERS:
                logging.getLogger(name).setLevel(logging.WARNING)
            if config.hydra.sweeper._target_ != GRID:  # which opens it when it knows the jobs
                open_parent_run(sweep, config)
                announce_jobs(config.hydra.sweeper.get("n_trials") or 0)
        except ConfigError as error:
            print(error, file=sys.stderr)
            raise SystemExit(1) from None
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None


def refuse_senseless_sweep(config: DictConfig) -> None:
    """Refuse what no sweep can do.

    Raises:
        ConfigError: says what to do instead.
    """
    _, swept = sweep_overrides(config)
    if config.hydra.job.chdir:
        raise ConfigError(NO_CHDIR)
    if "multirun_presets" in swept:
        raise ConfigError(
            f"multirun_presets={swept['multirun_presets']}: a preset is a sweep of its own. Give one command"
            " for each."
        )
    if is_training(config) and "trainer.threads" in swept:
        raise ConfigError(
            f"trainer.threads={swept['trainer.threads']}: the number of threads makes no other run, so only"
            " the first would be trained. Compare their speed by task=benchmark, one command for each."
        )
    sweeper = config.hydra.sweeper
    direction = getattr(sweeper.get("direction"), "name", sweeper.get("direction"))
    if is_training(config) and sweeper._target_.endswith("OptunaSweeper") and direction == "minimize":
        raise ConfigError(
            "hydra.sweeper.direction=minimize: a training run returns its accuracy, and Optuna would look for"
            " the worst. Add hydra.sweeper.direction=maximize."
        )


def begin_sweep(config: DictConfig) -> Sweep:
    """Name a sweep, and let its jobs know that they belong to it.

    Args:
        config: of the sweep, with Hydra's own part; what is swept has its default here.
    """
    _, swept = sweep_overrides(config)
    sweep = Sweep(
        name=config.hydra.runtime.choices.get("multirun_presets") or " x ".join(swept) or "sweep",
        folder=Path(config.hydra.sweep.dir).absolute(),
        outlived="submitit" in config.hydra.launcher._target_,
    )
    os.environ[START] = sweep.start
    SweepInfo(os.getpid(), threads_named="OMP_NUM_THREADS" in os.environ).publish()
    return sweep
