"""Figures of how runs go: a metric against the epoch, accuracy against the time of training."""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from okddip.tasks.report import runs
from okddip.tasks.report.attention import History
from okddip.tasks.report.costs import SPEED
from okddip.tasks.report.intervals import FEWEST_SEEDS
from okddip.tasks.report.styles import WIDTH, Series, groups_of, legend_below, new_figure, seeds_of
from okddip.tracking.params import params_of

if TYPE_CHECKING:
    from mlflow.entities import Run

FEWEST_EPOCHS_TO_MAGNIFY = 8
MOST_LINES, MOST_OF_A_METHOD = 8, 4  # that one panel holds; of more each has a panel of its own
MARKERS_IN_A_LINE = 5
SQUASHED = 3.0  # a range that is so many times larger for one failed setting is chosen without it
COLUMNS, PANEL_HEIGHT = 3, 1.45  # of small multiples; inches
OTHERS_COLOR = "#D5D5D5"


@dataclass
class Curve:
    """A group's metric; of each seed, by epoch from 1 on."""

    series: Series
    label: str
    values: pd.DataFrame  # index epoch, a column a seed
    x: pd.Series  # the same index; where each epoch stands: its number, or minutes

    @property
    def mean(self) -> pd.Series:
        return self.values.mean(axis=1)

    def band(self, most: float | None = None, *, log: bool = False) -> tuple[pd.Series, pd.Series]:
        """The mean less and plus one standard deviation; of fewer than three seeds the lowest and highest.

        On a logarithmic axis not below the lowest: a value that is hardly positive would fill the panel.
        """
        lowest, highest = self.values.min(axis=1), self.values.max(axis=1)
        if self.values.shape[1] < FEWEST_SEEDS:
            return lowest, highest
        spread = self.values.std(axis=1).fillna(0)
        return (self.mean - spread).clip(lower=lowest if log else 0), (self.mean + spread).clip(upper=most)


def curves_of(series: Sequence[Series], history: History, metric: str) -> list[Curve]:
    """The curves of those groups that logged the metric."""
    found = []
    for each in series:
        values = pd.DataFrame({runs.seed(run): history(run, metric) for run in each.group.runs})
        values = values.dropna(how="all")
        if not values.empty:
            label = each.label if metric.endswith("top1") else each.name
            found.append(Curve(each, label, values, values.index.to_series()))
    return found


def draw_over_epochs(
    series: Sequence[Series], history: History, metric: str, name: str, place: str, *, log: bool = False
) -> Figure | None:
    """A metric against the epoch: the mean over seeds, in a band of one standard deviation.

    A second panel shows the end of the run, whose differences the first epochs' range would hide. Where one
    panel cannot hold all groups each has one of its own.

    Args:
        log: whether the metric has a logarithmic axis.
    """
    curves = curves_of(series, history, metric)
    if not curves:
        return None
    log = log and all((curve.values > 0).all(axis=None) for curve in curves)
    most = 100.0 if metric.endswith("top1") else None
    last = max(int(curve.values.index[-1]) for curve in curves)
    if are_too_many(curves):
        return small_multiples(curves, "Epoch", name, place, most, log=log)
    starts = [0] if last < FEWEST_EPOCHS_TO_MAGNIFY else [0, last - last // 4]
    figure, panels = new_figure(place, len(starts))
    for axes, start in zip(panels, starts, strict=True):
        draw_lines(axes, curves, start, most, log=log)
        axes.set_xlabel("Epoch (last quarter)" if start else "Epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if last == 1:
            axes.set_xlim(0, 2)
        if log:
            make_logarithmic(axes, curves, start)
        elif start:
            show_range_of_most(axes, curves, start)
    panels[0].set_ylabel(name)
    legend_below(figure, panels[0].get_legend_handles_labels()[0], caption(curves))
    return figure


def draw_lines(
    axes: Axes, curves: Sequence[Curve], start: int, most: float | None, *, log: bool = False
) -> None:
    """A line for each curve from an epoch on; a band from three seeds on, below that a thin line for each."""
    for number, curve in enumerate(curves):
        style = curve.series.style
        shown = curve.values.index >= start
        x, mean = curve.x[shown], curve.mean[shown]
        step = max(1, len(mean) // MARKERS_IN_A_LINE)
        look = {"markevery": (number % step, step), "markeredgecolor": "white", "markeredgewidth": 0.4}
        axes.plot(x, mean, label=curve.label, **(style | look))
        if curve.values.shape[1] >= FEWEST_SEEDS:
            low, high = (part[shown] for part in curve.band(most, log=log))
            axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
        elif curve.values.shape[1] > 1:
            axes.plot(x, curve.values[shown], color=style["color"], linewidth=0.5, alpha=0.7)


def make_logarithmic(axes: Axes, curves: Sequence[Curve], start: int) -> None:
    """A logarithmic axis with labels a reader knows, as low as the lines, and not as their bands, go."""
    means = pd.concat([curve.mean[curve.mean.index >= start] for curve in curves])
    axes.set_yscale("log")
    axes.set_ylim(bottom=means.min() / 1.3, top=max(axes.get_ylim()[1], means.max() * 1.3))
    low, high = axes.get_ylim()
    decades = np.log10(high / low)
    steps = (1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def show_range_of_most(axes: Axes, curves: Sequence[Curve], start: int) -> None:
    """Choose the range of an axis so that a failed setting does not squash the others; name it instead."""
    ends = {}
    for curve in curves:
        shown = curve.values.index >= start
        low, high = (part[shown] for part in curve.band())
        if shown.any():
            ends[curve.label] = (float(low.min()), float(high.max()))
    below = squashing(list(ends.values()))
    if not below:
        return
    labels = [label for number, label in enumerate(ends) if number in below]
    kept = [ends[label] for label in ends if label not in labels]
    low, high = min(low for low, _ in kept), max(high for _, high in kept)
    margin = 0.06 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    finals = {curve.label: curve.mean.iloc[-1] for curve in curves}
    text = "below: " + "; ".join(f"{label} {finals[label]:.4g}" for label in labels)
    axes.text(
        *(0.02, 0.02, textwrap.fill(text, 44)),
        transform=axes.transAxes,
        fontsize=7,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )


def squashing(ranges: Sequence[tuple[float, float]]) -> set[int]:
    """Which of several ranges, the lowest of them, are left out so that the others can be told apart.

    As many as lie so low that with them the common range is `SQUASHED` times as long; more than half stay.
    """
    order = sorted(range(len(ranges)), key=lambda number: ranges[number][0])
    top = max(high for _, high in ranges)
    left_out = 0
    for count in range(1, (len(ranges) + 1) // 2):
        with_it = top - ranges[order[count - 1]][0]
        rest = top - ranges[order[count]][0]
        if with_it > SQUASHED * rest > 0:
            left_out = count
    return set(order[:left_out])


def are_too_many(curves: Sequence[Curve]) -> bool:
    """Whether one panel cannot hold them: settings of one method have one colour."""
    methods = Counter(curve.series.group.method for curve in curves)
    return len(curves) > MOST_LINES or max(methods.values()) > MOST_OF_A_METHOD


def small_multiples(
    curves: Sequence[Curve], x_name: str, name: str, place: str, most: float | None, *, log: bool = False
) -> Figure:
    """A panel for each curve, with all the others in grey."""
    rows = -(-len(curves) // COLUMNS)
    figure = Figure(figsize=(WIDTH, 0.7 + PANEL_HEIGHT * rows), layout="constrained")
    figure.suptitle(f"{place}\n{caption(curves)}; grey: the other settings", fontsize=9)
    grid = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True).ravel()
    for axes in grid[len(curves) :]:
        axes.set_axis_off()
    for axes, curve in zip(grid, curves, strict=False):
        for other in curves:
            axes.plot(other.x, other.mean, color=OTHERS_COLOR, linewidth=0.6)
        draw_lines(axes, [curve], 0, most, log=log)
        axes.set_title(textwrap.fill(curve.label, 34), fontsize=7)
        if x_name == "Epoch":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if log:
            make_logarithmic(axes, curves, 0)
    # the first epochs' range would hide the rest
    if not log:
        show_range_of_most(grid[0], curves, int(curves[0].values.index[-1]) // 4)
    for number, axes in enumerate(grid[: len(curves)]):
        axes.tick_params(labelbottom=number + COLUMNS >= len(curves))
    figure.supxlabel(x_name, fontsize=9)
    figure.supylabel(name, fontsize=9)
    return figure


def draw_over_time(series: Sequence[Series], history: History, place: str) -> Figure | None:
    """Accuracy against the minutes that training has taken so far: what a method costs for what it gives."""
    curves = []
    for curve in curves_of(series, history, "test/top1"):
        minutes = {
            runs.seed(run): spent
            for run in curve.series.group.runs
            if (spent := minutes_by_epoch(run, history)) is not None
        }
        if minutes:
            x = pd.DataFrame(minutes).mean(axis=1).reindex(curve.values.index)
            known = x.notna()
            curves.append(Curve(curve.series, curve.label, curve.values[known], x[known]))
    if not curves:
        return None
    devices = sorted({runs.device(run) for curve in curves for run in curve.series.group.runs} - {""})
    x_name = f"Minutes of training on {' and '.join(devices) or 'the device'}, without evaluations"
    if are_too_many(curves):
        return small_multiples(curves, x_name, "Test top-1 (%)", place, 100.0)
    figure, (axes,) = new_figure(place)
    draw_lines(axes, curves, 0, 100.0)
    for curve in curves:  # where each ends
        axes.plot(curve.x.iloc[-1], curve.mean.iloc[-1], **(curve.series.style | {"markersize": 7}))
    show_range_of_most(axes, curves, int(curves[0].values.index[-1]) // 4)
    axes.set_xlabel(x_name)
    axes.set_ylabel("Test top-1 (%)")
    handles, _ = axes.get_legend_handles_labels()
    legend_below(figure, handles, f"{caption(curves)}; large: the last epoch")
    return figure


def minutes_by_epoch(run: "Run", history: History) -> pd.Series | None:
    """Minutes that training has taken up to the end of each epoch; None if the store does not say."""
    speed = history(run, SPEED).dropna()
    images = runs.train_images(run)
    if images is None or speed.empty:
        return None
    known: Mapping[str, str] = params_of(run)
    if known.get("trainer.limit_batches", "null") != "null":
        images = min(images, int(known["trainer.limit_batches"]) * int(known["trainer.batch_size"]))
    return (images / speed).cumsum() / 60


def caption(curves: Sequence[Curve]) -> str:
    """What a line and its band are."""
    seeds = seeds_of(groups_of([curve.series for curve in curves]))
    if seeds == "one seed":
        return seeds
    counts = {curve.values.shape[1] for curve in curves}
    band = "; band: ± standard deviation" if max(counts) >= FEWEST_SEEDS else ""
    thin = f"; of fewer than {FEWEST_SEEDS}: thin, each run" if min(counts) < FEWEST_SEEDS else ""
    return f"mean over {seeds}{band}{thin}"
