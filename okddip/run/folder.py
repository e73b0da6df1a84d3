"""The folder of a run: its lock, `run.json` with what is known of the run, and its metrics by epoch."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from okddip import distributed
from okddip.errors import ConfigError
from okddip.files import write_text
from okddip.older_versions import first_epoch
from okddip.run.identity import run_identity
from okddip.tracking.unsent import LOCK_SECONDS, RUN_LOCK
from okddip.training import checkpoint

log = logging.getLogger(__name__)

SLURM = "slurm-"  # prefix of a Slurm job among the `job` of `run.json`

Epoch = tuple[int, int, dict[str, float]]  # number of the epoch, time in milliseconds since 1970, metrics


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run."""

    path: Path

    @property
    def metadata(self) -> dict[str, str]:
        """What `run.json` says of the run; empty if it is damaged."""
        file = self.path / "run.json"
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(facts, dict):
                raise ValueError("no JSON object")
            return {key: value for key, value in facts.items() if isinstance(value, str)}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s: cannot be read (%s) and is treated as empty.", file, error)
            return {}

    def update_metadata(self, **facts: str) -> None:
        """Add facts about the run to `run.json`."""
        write_text(self.path / "run.json", json.dumps(self.metadata | facts, indent=1) + "\n")

    def record_job(self, **facts: str) -> None:
        """Write down which jobs begin or resume the run now, and facts about it."""
        self.update_metadata(job=" ".join(sorted(current_jobs())), **facts)

    @property
    def identity(self) -> str | None:
        """The identity of the run; where `run.json` is damaged, that of its checkpoint."""
        if known := self.metadata.get("identity"):
            return known
        try:
            return run_identity(checkpoint.load(self.path / "last.pt")["config"])
        except ConfigError:
            return None

    def lock(self, *, patient: bool = False) -> AbstractContextManager[object]:
        """Hold the folder until the process ends at the latest, however it ends.

        Args:
            patient: wait for another process that holds it.

        Raises:
            ConfigError: another process holds it, and this one is not to wait; or it cannot be written.
        """
        held = FileLock(self.path / RUN_LOCK)
        try:
            return held.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            if patient:
                log.info(
                    "%s: another process is running this run; waiting for it. (If none is, remove run.lock"
                    " there.)",
                    self.path,
                )
                return held.acquire()
            raise ConfigError(
                f"{self.path}: this run is still running in another process. (If it is not, remove run.lock"
                " there.)"
            ) from None
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error.strerror}).") from error

    def read_metrics(self) -> list[Epoch]:
        """The whole lines of `metrics.jsonl`."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
        finished = []
        for line in lines:
            try:
                results = json.loads(line)
                epoch, timestamp_ms = results.pop("epoch"), results.pop("timestamp_ms")
            except (ValueError, KeyError, AttributeError):  # interrupted while it was written
                continue
            if isinstance(epoch, int) and isinstance(timestamp_ms, int):
                finished.append((epoch, timestamp_ms, results))
        return finished

    def write_metrics(self, finished: Sequence[Epoch]) -> None:
        """Replace `metrics.jsonl`."""
        lines = [
            json.dumps({"epoch": epoch, "timestamp_ms": timestamp_ms, **results}) + "\n"
            for epoch, timestamp_ms, results in finished
        ]
        write_text(self.path / "metrics.jsonl", "".join(lines))

    def repair_metrics(self, state: dict[str, Any] | None) -> None:
        """Give each epoch up to the last checkpoint one whole line in `metrics.jsonl`.

        A run may be interrupted between checkpoint and line. Lines of later epochs stay: their checkpoint was
        damaged, their metrics are logged already, and they will be trained again.

        Args:
            state: the last checkpoint, if there is one.
        """
        finished = self.read_metrics()
        if state is not None:
            last = state["epoch"] + first_epoch(state)
            if last not in (number for number, _, _ in finished):
                finished.append((last, state["timestamp_ms"], state["metrics"]))
        self.write_metrics(sorted(finished, key=lambda line: line[0]))

    def result_timestamp(self) -> int:
        """When a finished run came to its result, in milliseconds since 1970, by its `metrics.jsonl`.

        That is when its last epoch ended; in a file of an older version, whose times follow the clock back,
        later than all others. MLflow shows the latest value of a metric, so the result of a lengthened run
        must be later than the one before; and as the time is the same whenever it is asked for, a result that
        is logged again is not doubled.
        """
        *before, last = (timestamp_ms for _, timestamp_ms, _ in self.read_metrics())
        return max([last, *(timestamp_ms + 1 for timestamp_ms in before)])


@dataclass
class Run:
    """A run on disk: a new one, or one that is resumed."""

    folder: RunFolder
    state: dict[str, Any] | None = None  # the checkpoint that it resumes from
    tracking_id: str | None = None  # of its MLflow run, if it has one already
    store: str | None = None  # where its MLflow run was begun
    reopened: bool = False  # it is resumed in its own folder
    first_epoch: int = 1  # the number of its first epoch in `metrics.jsonl` and MLflow
    copied_from: Path | None = None  # it resumes from this checkpoint, which lies in no run's folder


def current_jobs() -> set[str]:
    """What stays the same when Slurm requeues or torchrun restarts this process; empty for neither."""
    slurm = os.environ.get("SLURM_JOB_ID")
    return {*distributed.torchrun_agents(), *([f"{SLURM}{slurm}"] if slurm else [])}


def restarted_jobs() -> set[str]:
    """Those of `current_jobs` that were requeued or restarted, so that they may have begun a run before.

    Of several machines, torchrun counts restarts only on the one where a process was killed; so where there
    are ranks, its count is not asked.
    """
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    restarted = distributed.world_size() > 1 or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return {job for job in current_jobs() if (requeued if job.startswith(SLURM) else restarted)}
