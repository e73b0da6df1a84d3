"""Means over seeds: differences with their intervals, and which values are as good as the best."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

ROUNDING_ERROR = 1e-9  # percent; a smaller spread is none
FEWEST_SEEDS = 3  # for which an interval or a band is shown: that of two is wider than any difference


class Difference(NamedTuple):
    """Mean of ours less theirs, with its 95% interval (NaN if the runs do not give one)."""

    mean: float
    low: float
    high: float
    pairs: int  # of runs with the same seed; 0: not paired
    seeds: int  # that the interval rests on: the pairs, or the runs of the side that has fewer

    @property
    def has_interval(self) -> bool:
        """Whether there is an interval that is worth showing."""
        return self.seeds >= FEWEST_SEEDS and not math.isnan(self.low)


def mean_difference(ours: pd.Series, theirs: pd.Series) -> Difference:
    """Mean difference with its 95% interval, from Student's t.

    Over the pairs of runs with the same seed if there are at least two, otherwise Welch's for two samples; of
    a single run, and of two without a seed in common, there is no interval.
    There is none if nothing varies: accuracies on few images are often equal, and that is no certainty.

    Args:
        ours, theirs: scores; the index is the seed.
    """
    paired = (ours - theirs).dropna()  # aligned by seed
    if len(paired) >= 2:
        mean, pairs = paired.mean(), len(paired)
        error, freedom = paired.sem(), float(pairs - 1)
    else:
        mean, pairs = ours.mean() - theirs.mean(), 0
        squares = np.array([ours.sem() ** 2, theirs.sem() ** 2])  # NaN for a single run
        error = np.sqrt(squares.sum())
        sizes = np.array([len(ours), len(theirs)])
        with np.errstate(divide="ignore", invalid="ignore"):
            freedom = float(squares.sum() ** 2 / (squares**2 / (sizes - 1)).sum())
        if len(paired) == 1 and sizes.min() == 1:
            mean, pairs = paired.mean(), 1
    half = float(stats.t.ppf(0.975, freedom) * error) if error > ROUNDING_ERROR else np.nan
    seeds = pairs or min(len(ours), len(theirs))
    return Difference(float(mean), float(mean - half), float(mean + half), pairs, seeds)


def mean_interval(scores: pd.Series) -> float:
    """Half of the 95% interval of a mean, from Student's t; NaN for fewer than `FEWEST_SEEDS` values."""
    if len(scores) < FEWEST_SEEDS:
        return math.nan
    return float(stats.t.ppf(0.975, len(scores) - 1) * scores.sem())


def best_of(columns: Sequence[pd.Series]) -> set[int]:
    """Where the highest mean stands, and the means within its 95% interval.

    Args:
        columns: scores over seeds. Those that lack a number do not take part.

    Returns:
        Nothing where the highest has too few seeds for an interval.
    """
    means = {place: scores.mean() for place, scores in enumerate(columns) if scores.notna().all()}
    if len(means) < 2:
        return set()
    highest = max(means, key=means.__getitem__)
    if len(columns[highest]) < FEWEST_SEEDS:  # that there is no interval does not make it the only best
        return set()
    half = mean_interval(columns[highest])
    lowest = means[highest] - (ROUNDING_ERROR if math.isnan(half) else max(half, ROUNDING_ERROR))
    return {place for place, mean in means.items() if mean >= lowest}
