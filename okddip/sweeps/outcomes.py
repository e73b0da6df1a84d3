"""What became of the jobs of a sweep."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # sweeps begin before anything heavy is imported
    from mlflow.entities import Run

log = logging.getLogger(__name__)

FINISHED_BEFORE, IDS_IN_A_TAG = "finished_before", 200  # MLflow's tags hold 8,000 letters


@dataclass
class Outcome:
    """What became of a job."""

    job: int
    overrides: list[str]
    kind: str  # finished, finished before, skipped, failed, cut off, not started
    reason: str = ""
    run_id: str = ""  # of the MLflow run that finished before
    value: float | None = None  # what the job returned
    start: str = ""  # `Sweep.start`
    seconds: float = 0.0  # that it took


def write_outcome(outcome: Outcome, folder: Path) -> None:
    """Write down what became of a job, in one step.

    In a file of its own for each start of the sweep: jobs on a cluster outlive their sweep, and those of the
    next one may have the same folders.
    """
    file = folder / f"outcome-{outcome.start[:8]}.json"
    file.with_suffix(".new").write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".new").replace(file)


def read_outcomes(folder: Path, start: str) -> list[Outcome]:
    """What became of the jobs that one start of a sweep began in its folder, by their number."""
    outcomes = []
    for path in folder.rglob("outcome-*.json"):
        try:
            outcome = Outcome(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            log.warning("%s: cannot be read (%s).", path, error)
            continue
        if outcome.start in (start, ""):
            outcomes.append(outcome)
    return sorted(outcomes, key=lambda outcome: outcome.job)


def is_success(outcomes: Sequence[Outcome]) -> bool:
    """Whether no job failed, and at least one was not skipped."""
    kinds = {outcome.kind for outcome in outcomes} - {"skipped"}
    return bool(kinds) and kinds <= {"finished", "finished before"}


def finished_before_tags(run_ids: Sequence[str]) -> dict[str, str]:
    """Tags of a parent run that name runs of other parents that count among its jobs."""
    parts = [run_ids[start : start + IDS_IN_A_TAG] for start in range(0, len(run_ids), IDS_IN_A_TAG)]
    return {f"{FINISHED_BEFORE}.{number}": " ".join(part) for number, part in enumerate(parts)}


def finished_before(parent: Run) -> set[str]:
    """IDs of the runs that `finished_before_tags` name."""
    tags = parent.data.tags.items()
    return {run_id for key, ids in tags if key.startswith(f"{FINISHED_BEFORE}.") for run_id in ids.split()}
