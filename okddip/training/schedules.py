"""Learning-rate schedules: functions of the epoch alone, so that a resumed run needs no state of theirs.

Each factory takes its options and the length of the run, and returns a function from the 0-based epoch to the
factor by which the optimizer's learning rate is multiplied in that epoch.
"""

import bisect
import itertools
import logging
import math
from collections.abc import Callable, Sequence

from okddip.errors import ConfigError, check_number

Schedule = Callable[[int], float]

log = logging.getLogger(__name__)


def multistep(*, milestones: Sequence[float], gamma: float, warmup_epochs: float, epochs: int) -> Schedule:
    """Multiply by `gamma` at each milestone.

    Args:
        milestones: ascending; epochs, or below 1 fractions of the run.
        gamma: factor at a milestone.
        warmup_epochs: see `with_linear_warmup`.
        epochs: length of the run.

    Raises:
        ConfigError: a value is out of range or the milestones do not ascend.
    """
    check_number("scheduler.gamma", gamma, above=0)
    if isinstance(milestones, str) or not isinstance(milestones, Sequence):
        raise ConfigError(f"scheduler.milestones={milestones}: must be a list, such as [150,225].")
    for milestone in milestones:
        check_number("scheduler.milestones", milestone, above=0)
    places = [milestone * epochs if milestone < 1 else milestone for milestone in milestones]
    if any(later <= earlier for earlier, later in itertools.pairwise(places)):
        raise ConfigError(f"scheduler.milestones={list(milestones)}: must ascend.")
    steps = [in_epochs(milestone, epochs) for milestone in milestones]
    late = [milestone for milestone, step in zip(milestones, steps, strict=True) if step >= epochs]
    if late:
        log.warning(
            "scheduler.milestones: %s lie past the last of %d epochs and do nothing."
            " Values below 1 are fractions of the run, rounded to whole epochs.",
            late,
            epochs,
        )
    return with_linear_warmup(lambda epoch: gamma ** bisect.bisect_right(steps, epoch), warmup_epochs, epochs)


def cosine(*, warmup_epochs: float, epochs: int) -> Schedule:
    """Half a cosine from 1 at the end of the warm-up towards 0 at the end of the run.

    Args:
        warmup_epochs: see `with_linear_warmup`.
        epochs: length of the run.
    """
    start = in_epochs(warmup_epochs, epochs)

    def factor(epoch: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * max(epoch - start, 0) / max(epochs - start, 1)))

    return with_linear_warmup(factor, warmup_epochs, epochs)


def constant(*, warmup_epochs: float, epochs: int) -> Schedule:
    """1 in each epoch after the warm-up.

    Args:
        warmup_epochs: see `with_linear_warmup`.
        epochs: length of the run.
    """
    return with_linear_warmup(lambda epoch: 1.0, warmup_epochs, epochs)


def with_linear_warmup(schedule: Schedule, warmup_epochs: float, epochs: int) -> Schedule:
    """Let the factor rise in equal steps to the schedule's own over the first epochs.

    Args:
        schedule: the factor without warm-up.
        warmup_epochs: epochs before the factor is the schedule's own; below 1 a fraction of the run.
        epochs: length of the run.

    Raises:
        ConfigError: the warm-up is negative or as long as the run.
    """
    check_number("scheduler.warmup_epochs", warmup_epochs, minimum=0, below=epochs)
    length = in_epochs(warmup_epochs, epochs)
    return lambda epoch: schedule(epoch) * min(1.0, (epoch + 1) / (length + 1))


def in_epochs(value: float, epochs: int) -> int:
    """Epochs as they are; below 1 as the nearest number of epochs in that fraction of the run."""
    return round(value * epochs) if value < 1 else int(value)
