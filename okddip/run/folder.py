"""The folder of a run: its lock, what it says of itself in `run.json`, its metrics by epoch."""

from __future__ import annotations

import json
import logging
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig

from okddip import distributed
from okddip.errors import ConfigError
from okddip.files import write_text
from okddip.run.identity import run_identity
from okddip.tracking.outbox import RUN_LOCK
from okddip.training import checkpoint

log = logging.getLogger(__name__)

SLURM = "slurm-"  # a job of Slurm's among `jobs`


@dataclass
class Run:
    """A run on disk."""

    folder: Path
    state: dict[str, Any] | None = None  # its last checkpoint, if it goes on from one
    tracking_id: str | None = None  # of the MLflow run it goes on with
    store: str | None = None  # where that one was begun
    taken_up: bool = False  # in its own folder


def record_job(run: Run, config: DictConfig) -> None:
    """Write down which jobs began a run or went on with it, and what they were asked for.

    And what a new run is; one that goes on may still be refused, for other images say.
    """
    asked = run_identity(config)
    new = {} if run.state else {"identity": asked}
    update_metadata(run, asked=asked, job=" ".join(sorted(current_jobs())), **new)


def update_metadata(run: Run, **facts: str) -> None:
    """Write down facts about a run in its `run.json`."""
    known = read_metadata(run.folder)
    write_text(run.folder / "run.json", json.dumps(known | facts, indent=1) + "\n")


def read_metadata(folder: Path) -> dict[str, str]:
    """What a run's `run.json` says; nothing if it is damaged."""
    path = folder / "run.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("no JSON object")
        return {key: value for key, value in facts.items() if isinstance(value, str)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s: cannot be read (%s), and counts as empty.", path, error)
        return {}


def current_jobs() -> set[str]:
    """What stays the same when Slurm requeues or torchrun restarts this process; empty for neither."""
    slurm = os.environ.get("SLURM_JOB_ID")
    return {*distributed.torchrun_agents(), *([f"{SLURM}{slurm}"] if slurm else [])}


def restarted_jobs() -> set[str]:
    """Those of `jobs` whose runs this process has begun, if there are any.

    Of several machines, torchrun counts restarts on that alone where a process was killed; so where there are
    ranks, its count is not asked.
    """
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    restarted = distributed.world_size() > 1 or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return {job for job in current_jobs() if (requeued if job.startswith(SLURM) else restarted)}


def stored_identity(folder: Path) -> str | None:
    """The identity of the run in a folder; where `run.json` is damaged, that of its checkpoint."""
    if known := read_metadata(folder).get("identity"):
        return known
    try:
        state = checkpoint.load(folder / "last.pt")
        return run_identity(state["config"], state.get("lengths", []))
    except ConfigError:
        return None


def lock_folder(folder: Path, *, patient: bool = False) -> AbstractContextManager[object]:
    """Hold a folder, until the process ends at the latest, however it ends.

    Raises:
        ConfigError: another process holds it, and this one is not to wait; or it cannot be written.
    """
    held = FileLock(folder / RUN_LOCK)
    try:
        return held.acquire(timeout=0)
    except Timeout:
        if patient:
            log.info("%s: another process works on this very run; waiting for it.", folder)
            return held.acquire()
        raise ConfigError(
            f"{folder}: this run is still running in another process. (If it is not, remove run.lock there.)"
        ) from None
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}).") from error


def read_metrics(path: Path) -> list[tuple[int, int, dict[str, float]]]:
    """Epoch, time (milliseconds since 1970) and metrics of each line of a `metrics.jsonl`."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    finished = []
    for line in lines:
        try:
            results = json.loads(line)
            finished.append((results.pop("epoch"), results.pop("timestamp_ms"), results))
        except (ValueError, KeyError, AttributeError):  # cut off while it was written
            continue
    return finished


def summary_timestamp(path: Path) -> int:
    """When a run that is finished came to its result, in milliseconds since 1970, by its `metrics.jsonl`.

    That is when its last epoch ended; in a file of an older version, whose times follow the clock back,
    later than all others. Of two results MLflow shows the later, so that of a longer run must be later; and
    as the time is the same whenever it is asked for, a result that is told of again is not doubled.
    """
    *before, last = (timestamp_ms for _, timestamp_ms, _ in read_metrics(path))
    return max([last, *(timestamp_ms + 1 for timestamp_ms in before)])


def write_metrics(run: Run, finished: list[tuple[int, int, dict[str, float]]]) -> None:
    """Replace a run's `metrics.jsonl`."""
    lines = [
        json.dumps({"epoch": epoch, "timestamp_ms": timestamp_ms, **results}) + "\n"
        for epoch, timestamp_ms, results in finished
    ]
    write_text(run.folder / "metrics.jsonl", "".join(lines))


def complete_metrics(run: Run) -> None:
    """See that each epoch up to the checkpoint has one whole line.

    A run may be cut off between checkpoint and line. Lines of later epochs stay: their checkpoint was
    damaged, they were told of, and will be trained again.
    """
    finished = read_metrics(run.folder / "metrics.jsonl")
    state = run.state
    if state is not None and state["epoch"] not in (epoch for epoch, _, _ in finished):
        finished.append((state["epoch"], state["timestamp_ms"], state["metrics"]))
    write_metrics(run, sorted(finished, key=lambda line: line[0]))
