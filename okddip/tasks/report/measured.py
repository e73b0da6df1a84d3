"""What this program's authors measured with it, to stand beside a user's own runs of the same regime.

The files in `measured/` are the `runs.csv` of reports, as they are.
"""

import csv
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from okddip.tasks.report.runs import TEACHER, settings, tag
from okddip.text import for_csv
from okddip.tracking.params import digests_of

if TYPE_CHECKING:
    from mlflow.entities import Run

FOLDER = Path(__file__).parent / "measured"
# What makes runs comparable; how and where they were computed (device, precision, compiler) does not count.
# Which images they are is told by digests, wherever they lie and whatever the data set is called.
REGIME = (
    *("model", "method", "optimizer", "scheduler"),
    *(f"trainer.{key}" for key in ("epochs", "batch_size", "limit_batches", "gradient_clip", "accumulate")),
    *("trainer.drop_last", "trainer.sync_batch_norm", "ranks"),
    *("dataset.train_size", "dataset.validation", "dataset.image_size", "dataset.pad", "dataset.flip"),
)
IMAGES = ("images.train", "images.test")  # digests

Row = Mapping[str, str]


class Measured(NamedTuple):
    """Runs of ours with the settings and images of a user's."""

    scores: pd.Series  # top-1 in percent after the last epoch, by seed
    source: str  # which file, when, with which version and on what

    def __str__(self) -> str:
        spread = f" ± {self.scores.std():.2f}" if len(self.scores) > 1 else ""
        return f"{self.scores.mean():.2f}{spread} (n = {len(self.scores)})"


def run_row(run: "Run") -> dict[str, Any]:
    """A run's line of `runs.csv` but for its results: what it is, where and when it was trained."""
    digests = digests_of(run)
    return {
        "run_id": run.info.run_id,
        "started": pd.to_datetime(run.info.start_time, unit="ms", utc=True).isoformat(timespec="seconds"),
        "version": tag(run, "version") or "",
        "device": tag(run, "device") or "",
        **{f"images.{split}": digests.get(split, "") for split in ("train", "test")},
        **settings(run),
    }


def measured_for(members: Sequence["Run"]) -> Measured | None:
    """Runs of ours in the regime of runs that have the same settings; those runs themselves are none."""
    row = {key: str(for_csv(value)) for key, value in run_row(members[-1]).items()}
    if not all(row[key] for key in IMAGES):
        return None
    own = {run.info.run_id for run in members}
    found = [known for known in known_runs(FOLDER).get(regime(row), []) if known["run_id"] not in own]
    if not found:
        return None
    scores = pd.Series({int(known["seed"]): float(known["last"]) for known in found}).sort_index()
    files = ", ".join(sorted({known["file"] for known in found}))
    latest = max(found, key=lambda known: known["started"])
    return Measured(
        scores, f"{files}, {latest['started'][:10]}, version {latest['version']}, {latest['device']}"
    )


def regime(row: Row) -> frozenset[tuple[str, str]]:
    """The settings and images of a run that must be the same for another to be comparable."""
    counts = {
        key: value
        for key, value in row.items()
        if key in (*REGIME, *IMAGES) or key.startswith(("model.", "method.", "optimizer.", "scheduler."))
    }
    if counts.get(f"{TEACHER}_model", "null") not in ("", "null"):  # its name holds more than is asked here
        counts.pop(TEACHER, None)
    return frozenset((key, value) for key, value in counts.items() if value not in ("", "null"))


@cache
def known_runs(folder: Path) -> dict[frozenset[tuple[str, str]], list[dict[str, str]]]:
    """Our runs by their regime; none where there is no file, or an empty one."""
    known: dict[frozenset[tuple[str, str]], list[dict[str, str]]] = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                known.setdefault(regime(row), []).append({**row, "file": path.name})
    return known
