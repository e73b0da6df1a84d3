"""The sweep that this process runs, and the lock that shows that it is running."""

from __future__ import annotations

import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from filelock import FileLock, Timeout

from okddip.errors import ConfigError
from okddip.sweeps.outcomes import Outcome, read_outcomes
from okddip.sweeps.progress import SAID
from okddip.tracking.unsent import LOCK_SECONDS, SWEEP_LOCK

if TYPE_CHECKING:  # sweeps begin before anything heavy is imported
    from okddip.tracking.tracker import MLflow, NoTracking


@dataclass
class Sweep:
    """A sweep that this process runs."""

    name: str
    folder: Path
    outlived: bool = False  # whether its jobs go on without this process
    start: str = field(default_factory=lambda: uuid.uuid4().hex)  # no other start of a sweep has this word
    tracker: MLflow | NoTracking | None = None  # None: jobs that train nothing have no parent run
    parent_run: str = ""  # its ID in MLflow
    jobs: list[list[str]] = field(default_factory=list)  # overrides of each, if they are known beforehand
    skipped: list[Outcome] = field(default_factory=list)  # of combinations that cannot be composed
    rerun: bool = False  # all jobs are trained, whatever was finished before
    lock_file: FileLock | None = None  # held as long as the sweep is running

    # Hydra hands nothing from its callbacks to the console command.
    current: ClassVar[Sweep | None] = None

    def lock(self) -> None:
        """Hold the folder, and show others that this sweep is running, until its process ends in any way.

        Raises:
            ConfigError: another sweep is running in this folder; its jobs' folders may have the same names.
                Or no lock can be taken there.
        """
        lock = FileLock(self.folder / SWEEP_LOCK)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            raise ConfigError(
                f"hydra.sweep.dir={self.folder}: another sweep is running in this folder, and the jobs of"
                " both would overwrite each other's files. Name another folder, or leave hydra.sweep.dir out:"
                " jobs that both have are trained only once. Or wait for the other to end."
            ) from error
        except OSError as error:  # a file system without locks
            raise ConfigError(
                f"hydra.sweep.dir={self.folder}: a file there cannot be locked ({error.strerror}), and"
                " neither could those of its runs. Name a folder on another file system."
            ) from error
        self.lock_file = lock
        shutil.rmtree(self.folder / SAID, ignore_errors=True)  # of one that was killed

    def unlock(self) -> None:
        shutil.rmtree(self.folder / SAID, ignore_errors=True)
        if self.lock_file is not None:
            self.lock_file.release()

    def outcomes(self) -> list[Outcome]:
        """What became of the jobs that have begun."""
        return read_outcomes(self.folder, self.start)

    def all_outcomes(self) -> list[Outcome]:
        """What became of all jobs; those that did not begin or were skipped come last."""
        begun = self.outcomes()
        numbers = {outcome.job for outcome in begun}
        return [
            *begun,
            *self.skipped,
            *(
                Outcome(number, job, "not started", "the sweep, or the job's process, ended before it began")
                for number, job in enumerate(self.jobs)
                if number not in numbers
            ),
        ]
