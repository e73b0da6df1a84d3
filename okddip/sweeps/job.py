"""One job of a sweep: run it unless it is finished already, and write down what became of it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from okddip.errors import ConfigError, Incompatible
from okddip.sweeps.environment import START, SweepInfo, is_training, objective, run_name
from okddip.sweeps.joblib import end_with_sweep
from okddip.sweeps.outcomes import Outcome, write_outcome
from okddip.sweeps.progress import label_lines, progress
from okddip.sweeps.same_run import finished_runs, interrupted_run, one_process_at_a_time
from okddip.text import for_terminal

log = logging.getLogger(__name__)

# what a job without a result returns: the worst value, for a sweeper that maximizes
NO_RESULT = float("-inf")

Task = Callable[[DictConfig], Any]


def run_job(config: DictConfig, check: Callable[[DictConfig], None], task: Task) -> Any:
    """Run a job of a sweep so that the others run too, whatever becomes of it.

    Args:
        config: of the job.
        check: resolves and checks it.
        task: what to do.

    Returns:
        What the task returns; minus infinity if it failed or was skipped.
    """
    end_with_sweep()
    started = time.monotonic()
    hydra = HydraConfig.get()
    label_lines(hydra.job.num)
    folder = Path(hydra.runtime.output_dir)
    outcome = Outcome(
        job=hydra.job.num,
        overrides=list(hydra.overrides.task),
        kind="cut off",  # stands if this process is killed
        reason=f"its process did not finish; see {folder}",
        start=os.environ.get(START, ""),
    )
    write_outcome(outcome, folder)
    value: Any = NO_RESULT
    kind, reason = "finished", ""
    try:
        check(config)
        log.info("job        %s", for_terminal(run_name(config)))
        if is_training(config):
            value, outcome.run_id = train_once(config, task)
            kind = "finished before" if outcome.run_id else "finished"
        else:
            value = task(config)
    except Incompatible as error:
        kind, reason = "skipped", str(error)
        log.info("Skipped: %s", error)
    except ConfigError as error:
        kind, reason = "failed", str(error)
        log.error("%s", error)
    except Exception as error:
        kind, reason = "failed", f"{type(error).__name__}: {error}"
        log.exception("Failed:")
    outcome.kind, outcome.reason = kind, reason
    outcome.value = value if isinstance(value, int | float) else None
    outcome.seconds = time.monotonic() - started
    write_outcome(outcome, folder)
    log.info("%s: %s", kind, progress(Path(hydra.sweep.dir), outcome.start, SweepInfo.read().jobs))
    return value


def train_once(config: DictConfig, train: Task) -> tuple[Any, str]:
    """Train a run unless it is finished already; resume it if it was interrupted.

    With `trainer.rerun=true` only what this very sweep has trained counts.

    Returns:
        What `train` returns, and the ID of the MLflow run if that was finished before.
    """
    parent = SweepInfo.read().parent_run if config.trainer.rerun else None
    with one_process_at_a_time(config):
        if run := next(finished_runs(config, parent=parent), None):
            log.info("%s: finished before, as MLflow run %s.", config.name, run.info.run_id)
            return objective(run.data.metrics), run.info.run_id
        if config.trainer.resume is None:
            config.trainer.resume = "auto" if parent is None else interrupted_run(config, parent)
        return train(config), ""
