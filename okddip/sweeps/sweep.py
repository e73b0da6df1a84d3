"""Sweeps: one parent run in MLflow, jobs that are not done twice, and what became of each.

A sweep begins in a callback of Hydra and ends in the console command, since Hydra calls no callback at the
end of a sweep that broke off. Between the two, jobs run in this process, in joblib's or on a cluster: they
learn of their sweep from the environment, and leave what became of them in a file of their output folder.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from okddip.errors import ConfigError
from okddip.signals import stops_deferred
from okddip.sweeps.environment import NAME, NO_CHDIR, PARENT_RUN, PROCESS, START, UNNAMED
from okddip.sweeps.job import TRAIN
from okddip.sweeps.joblib import PATIENCE
from okddip.sweeps.outcomes import GOOD, Outcome, finished_before_tags, read_outcomes
from okddip.sweeps.parent import Sweep, lock_sweep, open_parent, sweep_overrides, unlock_sweep
from okddip.text import for_terminal

if TYPE_CHECKING:  # sweeps begin before anything heavy is imported
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    Report = Callable[[MlflowClient, list[Run], Path, str], object]

log = logging.getLogger(__name__)


GRID = "hydra_plugins.okddip.GridSweeper"


# Hydra hands nothing from its callbacks to the console command.
_begun: Sweep | None = None


class BeginSweep(Callback):
    """Begins a sweep. Hydra ignores exceptions of callbacks; leaving is none."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global _begun
        try:
            _begun = begin_sweep(config)
            lock_sweep(_begun)
            if config.hydra.sweeper._target_ != GRID:  # which first looks what the jobs are
                open_parent(_begun, config)
        except ConfigError as error:
            print(error, file=sys.stderr)
            raise SystemExit(1) from None
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None


def begin_sweep(config: DictConfig) -> Sweep:
    """Name a sweep.

    Args:
        config: of the sweep, with Hydra's own part; what is swept has its default here.

    Raises:
        ConfigError: something is asked for that no sweep does.
    """
    _, swept = sweep_overrides(config)
    if config.hydra.job.chdir:
        raise ConfigError(NO_CHDIR)
    if "multirun_presets" in swept:
        raise ConfigError(
            f"multirun_presets={swept['multirun_presets']}: a preset is a sweep of its own. Give one command"
            " for each."
        )
    sweeper, training = config.hydra.sweeper, config.task._target_ == TRAIN
    direction = getattr(sweeper.get("direction"), "name", sweeper.get("direction"))
    if training and sweeper._target_.endswith("OptunaSweeper") and direction == "minimize":
        raise ConfigError(
            "hydra.sweeper.direction=minimize: a training run returns its accuracy, and Optuna would look for"
            " the worst. Add hydra.sweeper.direction=maximize."
        )
    os.environ[START], os.environ[PROCESS] = uuid.uuid4().hex, str(os.getpid())
    name = config.hydra.runtime.choices.get("multirun_presets") or " x ".join(swept) or "sweep"
    submitit = "submitit" in config.hydra.launcher._target_
    return Sweep(name, Path(config.hydra.sweep.dir).absolute(), outlived=submitit)


def announce_jobs(config: DictConfig, jobs: list[list[str]], left_out: list[Outcome]) -> None:
    """Open the parent run of this process's sweep, now that its jobs are known.

    Args:
        config: of the sweep.
        jobs: their overrides.
        left_out: combinations that cannot be.
    """
    if _begun is not None:
        open_parent(_begun, config)
        numbered = [replace(outcome, job=len(jobs) + more) for more, outcome in enumerate(left_out)]
        _begun.jobs, _begun.left_out = jobs, numbered


def current_outcomes() -> list[Outcome]:
    """What has become of the jobs of this process's sweep up to now."""
    return [] if _begun is None else read_outcomes(_begun.folder, os.environ.get(START, ""))


def finish_sweep(report: Report, error: BaseException | None = None) -> bool:
    """Close and report on the sweep of this process, if there is one.

    Args:
        report: compares the runs of a sweep, see `write_report`.
        error: what the program ends with before its time.

    Returns:
        Whether nothing failed.
    """
    global _begun
    with stops_deferred():
        sweep, _begun = _begun, None
        for name in (NAME, UNNAMED, PROCESS):
            os.environ.pop(name, None)
        parent = os.environ.pop(PARENT_RUN, "")
        start = os.environ.pop(START, "")
        if sweep is None:
            return True
        outcomes = all_outcomes(sweep, start)
        finished_before = [outcome.run_id for outcome in outcomes if outcome.run_id]
        if parent and outcomes and not is_stop(error):
            try:
                if sweep.tracker is not None:
                    sweep.tracker.finish_ended_runs()  # of jobs, and of their teachers, that were killed
                write_report(sweep, parent, finished_before, report)
            except Exception:  # the jobs are done, and the last lines are still to be said
                log.exception("The end of the sweep is not whole:")
            except BaseException as stop:
                error = stop
        kinds = Counter(outcome.kind for outcome in outcomes)
        good = error is None and kinds.keys() <= GOOD and kinds["skipped"] < len(outcomes)
        if is_stop(error):
            kill_child_processes()
        if sweep.tracker is not None:
            if is_stop(error):
                sweep.tracker.finish("KILLED")  # first of all: there may be seconds left
            sweep.tracker.set_tags(finished_before_tags(finished_before))
            if is_stop(error):
                sweep.tracker.finish_ended_runs()
            else:
                sweep.tracker.finish("FINISHED" if good else "FAILED")
        print_summary(sweep, outcomes, good, error)
        unlock_sweep(sweep)
    if is_stop(error):
        raise error
    return good


def all_outcomes(sweep: Sweep, start: str) -> list[Outcome]:
    """What became of the jobs of a sweep, those among them that did not begin or cannot be."""
    outcomes = read_outcomes(sweep.folder, start) + sweep.left_out
    begun = {outcome.job for outcome in outcomes}
    return outcomes + [
        Outcome(number, job, "not started", "the sweep ended before its turn, or its process at once")
        for number, job in enumerate(sweep.jobs)
        if number not in begun
    ]


def kill_child_processes() -> None:
    """Kill processes of this one that are left: a second signal may have kept joblib from it."""
    for process in multiprocessing.active_children():
        process.kill()
        process.join(PATIENCE)


def is_stop(error: BaseException | None) -> TypeGuard[BaseException]:
    """Whether the program was asked to end."""
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code != 1)


def print_summary(sweep: Sweep, outcomes: Sequence[Outcome], good: bool, error: BaseException | None) -> None:
    """Print the last lines of a sweep: how many jobs became what, and why those that are not finished."""
    kinds = Counter(outcome.kind for outcome in outcomes)
    jobs = "1 job" if len(outcomes) == 1 else f"{len(outcomes) or 'no'} jobs"
    counts = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    print(f"Sweep {for_terminal(sweep.name)}, {jobs}{': ' if counts else ''}{counts}.")
    common = (
        set.intersection(*(set(outcome.overrides) for outcome in outcomes)) if len(outcomes) > 1 else set()
    )
    for kind in ("skipped", "not started", "cut off", "failed"):
        for outcome in outcomes:
            if outcome.kind == kind:
                own = " ".join(part for part in outcome.overrides if part not in common)
                reason = for_terminal(outcome.reason, lines=True).replace("\n", "\n  ")
                print(f"{kind} #{outcome.job} {for_terminal(own)}: {reason}")
    if is_stop(error) and sweep.outlived:
        print("Jobs that submitit was given may go on, or begin, without this process.")
    cause = error.__context__ if isinstance(error, SystemExit) and not is_stop(error) else None
    if outcomes and isinstance(cause, Exception):
        kind = "" if isinstance(cause, HydraException) else f"{type(cause).__name__}: "
        first_line, *_ = str(cause).splitlines() or [""]
        print(f"The sweep itself ended early: {kind}{for_terminal(first_line)}")
    elif sweep.tracker is not None and outcomes and not good:
        again = "The same command again"
        if sweep.forced and not is_stop(error):
            again = "The same command without trainer.rerun=true"
        print(f"{again} does what is missing, and nothing twice.")


def write_report(sweep: Sweep, parent: str, finished_before: list[str], report: Report) -> None:
    """Print the table of a sweep's runs, and log tables and figures to its parent run.

    Args:
        parent: ID of the parent run.
        finished_before: IDs of the runs that were not trained again; they may be of another sweep.
        report: takes MLflow's client, the runs, a folder to write to and the ID of the parent run.
    """
    from okddip.tracking.store import open_store
    from okddip.tracking.tracker import MLflow
    from okddip.tracking.waiting import InterruptibleClient

    assert isinstance(sweep.tracker, MLflow)
    try:
        client = cast("MlflowClient", InterruptibleClient(open_store(sweep.tracker.uri)))
        runs = {run.info.run_id: run for run in sweep.tracker.find({"mlflow.parentRunId": parent})}
        runs |= {run_id: client.get_run(run_id) for run_id in finished_before if run_id not in runs}
        report(client, list(runs.values()), sweep.folder / "report", parent)
    except Exception as error:  # the runs are whole without it, and `okddip task=report` makes it again
        log.warning("The report on this sweep is not whole: %s", error)
