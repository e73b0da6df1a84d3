"""The end of a sweep: its report, the status of its parent run, its last lines."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, cast

from okddip.signals import stops_deferred
from okddip.sweeps.environment import START, SWEEP, is_teacher
from okddip.sweeps.outcomes import finished_before_tags, is_success
from okddip.sweeps.summary import print_summary
from okddip.sweeps.sweep import Sweep

if TYPE_CHECKING:  # sweeps begin before anything heavy is imported
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    Report = Callable[[MlflowClient, list[Run], Path, str], object]

log = logging.getLogger(__name__)

CHILD_SECONDS = 5.0  # for a killed process to be gone


def finish_sweep(report: Report, error: BaseException | None = None) -> bool:
    """Close and report on the sweep of this process, if there is one.

    Args:
        report: compares the runs of a sweep, see `write_report`.
        error: with which the program ends early.

    Returns:
        Whether nothing failed.
    """
    with stops_deferred():
        sweep, Sweep.current = Sweep.current, None
        if sweep is None:
            return True
        for variable in (SWEEP, START):
            os.environ.pop(variable, None)
        outcomes = sweep.all_outcomes()
        finished_before = [outcome.run_id for outcome in outcomes if outcome.run_id]
        if sweep.parent_run and outcomes and not is_stop(error):
            try:
                write_report(sweep, finished_before, report)
            except Exception:  # the jobs are done, and the last lines are still to be printed
                log.exception("The sweep's runs could not be closed or reported on:")
            except BaseException as stop:
                error = stop
        good = error is None and is_success(outcomes)
        status = "KILLED" if is_stop(error) else "FINISHED" if good else "FAILED"
        if status == "KILLED":
            kill_child_processes()
        close_parent_run(sweep, status, finished_before)
        print_summary(sweep, outcomes, status, error)
        sweep.unlock()
    if is_stop(error):
        raise error
    return good


def is_stop(error: BaseException | None) -> TypeGuard[BaseException]:
    """Whether the program was asked to end."""
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code != 1)


def kill_child_processes() -> None:
    """Kill child processes that are left: a second signal may have kept joblib from it."""
    for process in multiprocessing.active_children():
        process.kill()
        process.join(CHILD_SECONDS)


def close_parent_run(sweep: Sweep, status: str, finished_before: Sequence[str]) -> None:
    """End the parent run, and the runs of jobs that were killed.

    Args:
        sweep: that ends.
        status: of the parent run.
        finished_before: IDs of the runs that were not trained again.
    """
    if sweep.tracker is None:
        return
    if status == "KILLED":
        sweep.tracker.finish(status)  # before all else: there may be seconds left
    sweep.tracker.set_tags(finished_before_tags(finished_before))
    if status == "KILLED":
        sweep.tracker.finish_ended_runs()
    else:
        sweep.tracker.finish(status)


def write_report(sweep: Sweep, finished_before: Sequence[str], report: Report) -> None:
    """Print the table of a sweep's runs, and log tables and figures to its parent run.

    Args:
        sweep: whose jobs are done.
        finished_before: IDs of the runs that were not trained again; they may be of another sweep.
        report: takes MLflow's client, the runs, a folder to write to and the ID of the parent run.
    """
    from okddip.tracking.store import open_store
    from okddip.tracking.tracker import MLflow
    from okddip.tracking.waiting import InterruptibleClient

    assert isinstance(sweep.tracker, MLflow)
    sweep.tracker.finish_ended_runs()  # of jobs, and of their teachers, that were killed
    try:
        client = cast("MlflowClient", InterruptibleClient(open_store(sweep.tracker.uri)))
        children = sweep.tracker.find({"mlflow.parentRunId": sweep.parent_run})
        runs = {run.info.run_id: run for run in children if not is_teacher(run)}
        runs |= {run_id: client.get_run(run_id) for run_id in finished_before if run_id not in runs}
        report(client, list(runs.values()), sweep.folder / "report", sweep.parent_run)
    except Exception as error:  # the runs are whole without it, and `okddip task=report` makes it again
        log.warning("The report on this sweep is incomplete: %s", error)
