"""The results of a run's epochs: when each was finished, the last, and the best so far."""

import time
from collections.abc import Mapping
from typing import Any

Results = dict[str, float]


class History:
    """Which epoch was the last and which the best, over all interruptions of a run.

    Args:
        split: by whose top-1 the best epoch is chosen, `val` or `test`.
        state: the checkpoint of the run's last finished epoch, if it goes on from one.
        reported: time (milliseconds since 1970) and results of epochs that were reported before. One that is
            trained again, its checkpoint being damaged, is not reported in other words.
    """

    def __init__(
        self,
        split: str,
        state: Mapping[str, Any] | None = None,
        reported: Mapping[int, tuple[int, Results]] | None = None,
    ) -> None:
        self.split = split
        self.kept: dict[str, Results] = {} if state is None else state["history"]  # `last` and `best`
        self.reported = reported or {}
        times = [timestamp_ms for timestamp_ms, _ in self.reported.values()]
        self.latest_ms = max([0 if state is None else state["timestamp_ms"], *times])

    def add(self, epoch: int, results: Results) -> tuple[int, Results, bool]:
        """Take the results of an epoch.

        Returns:
            When it was finished (milliseconds since 1970), its results, and whether it is the best so far.
        """
        # the clock may be behind that of the epochs before: another machine's, or set back
        now = max(time.time_ns() // 1_000_000, self.latest_ms + 1)
        timestamp_ms, results = self.reported.get(epoch, (now, results))
        self.latest_ms = max(self.latest_ms, timestamp_ms)
        score = f"{self.split}/top1"
        if score not in results:
            return timestamp_ms, results, False
        is_best = "best" not in self.kept or results[score] > self.kept["best"][score]
        if is_best:
            self.kept["best"] = {"epoch": epoch, **results}
        self.kept["last"] = {"epoch": epoch, **results}
        return timestamp_ms, results, is_best

    def line(self, epoch: int, epochs: int, results: Results, is_best: bool) -> str:
        """What the terminal shows of an epoch; with the number of a sweep's job before it, in 80 columns."""
        fields = [
            f"epoch {epoch + 1}/{epochs}",
            f"loss {results['train/loss']:.3f}",
            # a moving average that no loss needs is measured in evaluations alone
            *((f"train {results['train/top1']:.2f}%",) if "train/top1" in results else ()),
        ]
        score = f"{self.split}/top1"
        if score in results:
            fields.append(f"{self.split} {results[score]:.2f}%" + (" (best)" if is_best else ""))
        fields.append(f"{results['train/images_per_second']:.0f} images/s")
        return "  ".join(fields)
