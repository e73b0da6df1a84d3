"""The last lines of a sweep: how many jobs became what, and why those that are not finished."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hydra.errors import HydraException

from okddip.sweeps.outcomes import Outcome
from okddip.sweeps.sweep import Sweep
from okddip.text import for_terminal

EXPLAINED = ("skipped", "cut off", "failed")  # kinds of outcomes, in this order
MOST_NUMBERS = 8  # of jobs that did not begin, in one line


def print_summary(
    sweep: Sweep, outcomes: Sequence[Outcome], status: str, error: BaseException | None
) -> None:
    """Print the last lines of a sweep.

    Args:
        sweep: that ends.
        outcomes: of all its jobs.
        status: of its parent run: FINISHED, FAILED or KILLED.
        error: with which the program ends early.
    """
    stopped = status == "KILLED"
    if sweep.parent_run and sweep.tracker is not None and outcomes and not stopped:
        print(sweep.tracker.how_to_open())
    jobs = "1 job" if len(outcomes) == 1 else f"{len(outcomes) or 'no'} jobs"
    kinds = Counter(outcome.kind for outcome in outcomes)
    counts = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    print(f"Sweep {for_terminal(sweep.name)}, {jobs}{': ' if counts else ''}{counts}.")
    print_reasons(outcomes)
    if stopped and sweep.outlived:
        print("Jobs that submitit was given may go on, or begin, without this process.")
    if not outcomes:
        return
    cause = error.__context__ if isinstance(error, SystemExit) and not stopped else None
    if isinstance(cause, Exception):
        kind = "" if isinstance(cause, HydraException) else f"{type(cause).__name__}: "
        first_line, *_ = str(cause).splitlines() or [""]
        print(f"The sweep itself ended early: {kind}{for_terminal(first_line)}")
    elif sweep.tracker is not None and status != "FINISHED":
        again = " without trainer.rerun=true" if sweep.rerun and not stopped else " again"
        print(f"The same command{again} does what is missing, and nothing twice.")


def print_reasons(outcomes: Sequence[Outcome]) -> None:
    """Print why jobs are not finished, each with the overrides that not all jobs have.

    Those that did not begin have one line: there may be many, and there is one reason.
    """
    common = set.intersection(*(set(each.overrides) for each in outcomes)) if len(outcomes) > 1 else set()
    if waiting := [outcome for outcome in outcomes if outcome.kind == "not started"]:
        numbers = ", ".join(f"#{outcome.job}" for outcome in waiting[:MOST_NUMBERS])
        more = f" and {len(waiting) - MOST_NUMBERS} more" if len(waiting) > MOST_NUMBERS else ""
        print(f"not started {numbers}{more}: {waiting[0].reason}")
    for kind in EXPLAINED:
        for outcome in outcomes:
            if outcome.kind == kind:
                own = " ".join(override for override in outcome.overrides if override not in common)
                reason = for_terminal(outcome.reason, lines=True).replace("\n", "\n  ")
                print(f"{kind} #{outcome.job} {for_terminal(own)}: {reason}")
