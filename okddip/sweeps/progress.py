"""What the terminal shows of a sweep as it goes on: the job of a line, how many are done, when all are."""

from __future__ import annotations

import datetime
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from okddip.sweeps.outcomes import Outcome, read_outcomes
from okddip.text import LogFormatter, is_said_once

SAID = ".said"  # folder in that of the sweep: a file for each message that is said once


def label_lines(job: int) -> None:
    """Let each line that this job prints begin with its number, and hold back what another job has said.

    Hydra makes new handlers for the next job. In the log of its run the lines are as ever.
    """
    hydra = HydraConfig.get()
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, LogFormatter) and not isinstance(handler, logging.FileHandler):
            handler.formatter.prefix = f"#{job} "
            if "submitit" not in hydra.launcher._target_:  # there each job has an output of its own
                handler.addFilter(NotSaidBefore(Path(hydra.sweep.dir) / SAID))


class NotSaidBefore(logging.Filter):
    """Holds back what one job of a sweep has to say for all, if it was said; see `is_said_once`.

    Args:
        folder: has a file for each message; jobs in several processes may log the same at one moment.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def filter(self, record: logging.LogRecord) -> bool:
        if not is_said_once(record):
            return True
        text = (
            record.getMessage() if record.levelno >= logging.WARNING else str(record.msg)
        )  # whatever folder
        file = self.folder / hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]
        try:
            self.folder.mkdir(exist_ok=True)
            file.touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # no room, say
            return True
        return True


def progress(folder: Path, start: str, jobs: int) -> str:
    """How many jobs of a sweep are done, and when all will be: `4 of 14 done, 10 left until ...`.

    Args:
        folder: of the sweep.
        start: the word for this start of the sweep.
        jobs: how many it has; 0: nobody knows.
    """
    outcomes = read_outcomes(folder, start)
    done = [outcome for outcome in outcomes if outcome.kind != "cut off"]
    if not jobs:
        return f"{len(done)} done"
    text = f"{len(done)} of {jobs} done"
    left = jobs - len(done)
    if left <= 0:
        return text
    text += f", {left} left"
    seconds = expected_seconds(done, running=len(outcomes) - len(done), waiting=jobs - len(outcomes))
    if seconds is None:
        return text
    end = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
    return f"{text} until {end:%Y-%m-%d %H:%M} (in {datetime.timedelta(seconds=round(seconds))})"


def expected_seconds(done: Sequence[Outcome], running: int, waiting: int) -> float | None:
    """How long the jobs that are left take, going by those that were trained; None if there are none yet.

    Those that are running are half done on average. As many as run now, and one more, run side by side.
    """
    trained = [outcome.seconds for outcome in done if outcome.kind == "finished"]
    if not trained:
        return None
    return sum(trained) / len(trained) * (waiting + running / 2) / (running + 1)
