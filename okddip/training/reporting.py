"""What is kept and said of each epoch: its checkpoint, its metrics, and when the run will end."""

import datetime
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from okddip.files import append_line
from okddip.signals import stops_deferred
from okddip.training import checkpoint

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where the results of each epoch go."""

    def log(self, metrics: Mapping[str, float], epoch: int, timestamp_ms: int) -> None:
        """Take the results of the epoch with that number, finished then (milliseconds since 1970)."""


def save_epoch(
    state: dict[str, Any], folder: Path, tracker: Tracker, *, number: int, new: bool, best: bool
) -> None:
    """Write down and log what an epoch has come to.

    In this order a run cut off anywhere here is resumed with no metric missing or doubled: the checkpoint has
    what a lost line said, and the tracker is told again from the file.

    Args:
        state: the checkpoint.
        folder: gets it and, where the epoch is `new` in it, a line in `metrics.jsonl`.
        tracker: is told of the metrics.
        number: of the epoch, where people look.
        best: whether it is the best checkpoint so far.

    Raises:
        ConfigError: a file cannot be written.
    """
    epoch = {"epoch": number, "timestamp_ms": state["timestamp_ms"]}
    with stops_deferred():
        checkpoint.save(state, folder, best=best)
        if new:
            append_line(folder / "metrics.jsonl", json.dumps(epoch | state["metrics"]))
    tracker.log(state["metrics"], number, state["timestamp_ms"])


def log_expected_end(started: float, epochs: int) -> None:
    """Say when the run will end, going by its first epoch here, when `epochs` are left.

    `started` is of the monotonic clock, in seconds.
    """
    seconds = (time.monotonic() - started) * epochs
    end = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
    log.info(
        "expected end %s, in %s",
        end.strftime("%Y-%m-%d %H:%M:%S"),
        datetime.timedelta(seconds=round(seconds)),
    )
