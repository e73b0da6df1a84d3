"""Figures of a comparison, one file each as PNG and PDF: what there is, and those of results."""

import hashlib
import logging
import os
import re
import textwrap
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from okddip.signals import raise_deferred_stop
from okddip.tasks.attention import ENTRY, TAG
from okddip.tasks.report import runs
from okddip.tasks.report.attention import History, draw_attention, has_attention, read_attention
from okddip.tasks.report.compare import Comparison, Group
from okddip.tasks.report.curves import draw_over_epochs, draw_over_time, squashing
from okddip.tasks.report.intervals import FEWEST_SEEDS, mean_interval
from okddip.tasks.report.styles import (
    DPI,
    RC_PARAMS,
    Series,
    groups_of,
    legend_below,
    look,
    new_figure,
    seeds_of,
    series_of,
)
from okddip.text import for_terminal
from okddip.tracking.params import params_of

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

# how a predictor fills the marker of its method
PREDICTORS = {
    "leader": ("group leader", "full"),
    "mean": ("mean peer", "left"),
    "ema/mean": ("mean averaged peer", "bottom"),
    "ensemble": ("ensemble of peers", "none"),
}
FILLS = ("full", "left", "bottom", "right", "top")  # of peers that differ
PEERS = re.compile(r", \d+ peers")  # in the name of a group
GREY = "#444444"  # of what stands for all methods
MAX_NAME_BYTES = 150  # most file systems take 255 with an ending
MOST_ATTENTION = 8  # figures of attention for one data set and model
LABEL_WIDTH = 30  # letters in a line
ROW_HEIGHT = 0.36  # inches

log = logging.getLogger(__name__)


def write_figures(client: "MlflowClient", comparisons: Sequence[Comparison], folder: Path) -> None:
    """Write the figures that the runs' metrics allow, for each data set and model."""

    known: dict[tuple[str, str], pd.Series] = {}

    files: dict[str, dict[str, pd.Series]] = {}

    def history(run: "Run", metric: str) -> pd.Series:
        run_id = run.info.run_id
        if TAG in run.data.tags and ENTRY.fullmatch(metric):
            if run_id not in files:
                files[run_id] = read_attention(client, run)
            return files[run_id].get(metric, pd.Series(dtype=float))
        if (run_id, metric) not in known:
            known[run_id, metric] = runs.metric_history(client, run, metric)
        return known[run_id, metric]

    written: set[str] = set()
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it logs each letter in a PDF
    with matplotlib.rc_context(RC_PARAMS):  # type: ignore[arg-type]
        for comparison in comparisons:
            for model in dict.fromkeys(group.settings["model"] for group in comparison.groups):
                name = f"{comparison.dataset}-{model}"
                for kind, figure in draw(comparison, model, history).items():
                    raise_deferred_stop()
                    stem = file_name(f"{kind}-{name}", written)
                    for ending in ("png", "pdf"):
                        figure.savefig(folder / f"{stem}.{ending}", dpi=DPI)


def file_name(words: str, taken: set[str]) -> str:
    """A name for a file, without its ending: of words, short enough for any disk, and then one of `taken`."""
    name = re.sub(r"[^\w.-]+", "_", words)
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # a locale without these letters
        name = re.sub(r"[^\w.-]+", "_", words, flags=re.ASCII)
    if len(name.encode()) > MAX_NAME_BYTES or name in taken:
        word = hashlib.sha256(words.encode()).hexdigest()[:8]
        name = f"{name.encode()[:MAX_NAME_BYTES].decode(errors='ignore')}-{word}"
    taken.add(name)
    return name


def draw(comparison: Comparison, model: str, history: History) -> dict[str, Figure]:
    """The figures of one data set and model, by kind."""
    series = series_of(comparison, model)
    place = for_terminal(f"{comparison.dataset}, {model}")
    figures = {
        "headline": draw_headline(series, place),
        "accuracy": draw_over_epochs(series, history, "test/top1", "Test top-1 (%)", place),
        "time": draw_over_time(series, history, place),
        "diversity": draw_over_epochs(
            *(series, history, "test/diversity"),
            *("Diversity (mean L2 distance\nof peers' softmax outputs)", place),
            log=True,
        ),
        "predictors": draw_predictors(series, place),
        "peers": draw_against_peers(series, history, place),
    }
    attentive = [each for each in series if has_attention(each.group)]
    for each in attentive[:MOST_ATTENTION]:
        key = f"attention-{for_terminal(comparison.label(each.group))}"
        figures[key] = draw_attention(each.group, history, f"{each.name} on {place}")
    if len(attentive) > MOST_ATTENTION:
        log.info(
            "%s: attention is drawn of the first %d of %d settings; report.where chooses others.",
            *(place, MOST_ATTENTION, len(attentive)),
        )
    return {kind: figure for kind, figure in figures.items() if figure is not None}


def draw_headline(series: Sequence[Series], place: str) -> Figure:
    """The table as a picture: a row a setting, a dot a run, mean and 95% interval, ensemble and cost."""
    figure, (axes,) = new_figure(place, height=0.75 + ROW_HEIGHT * len(series))
    shown = {"run": False, "interval": False, "ensemble": False}
    for row, each in enumerate(series):
        scores, color, marker = each.group.scores["last"], each.style["color"], each.style["marker"]
        ensemble = each.group.scores["ensemble"].mean()
        if not np.isnan(ensemble) and each.group.predictor != "ensemble":
            axes.plot(ensemble, row, "D", color=color, fillstyle="none", markersize=6, markeredgewidth=1)
            shown["ensemble"] = True
        if len(scores) > 1:
            beside = 0.22 * (np.arange(len(scores)) % 2 * 2 - 1)  # so that equal ones do not hide each other
            axes.plot(scores, row + beside, ".", color=color, alpha=0.65, markersize=7, markeredgewidth=0)
            shown["run"] = True
        half = mean_interval(scores)
        shown["interval"] |= not np.isnan(half)
        bar: dict[str, Any] = {} if np.isnan(half) else {"xerr": half, "capsize": 2.5, "elinewidth": 1.3}
        axes.errorbar(scores.mean(), row, color=color, marker=marker, markersize=6, **bar)
        cost = "\n".join(filter(None, (each.group.cost.training, each.group.cost.inference)))
        axes.annotate(
            *(cost, (1.01, row)),
            xycoords=axes.get_yaxis_transform(),
            fontsize=6,
            va="center",
            color=GREY,
            annotation_clip=False,
        )
    if any(each.group.cost.training or each.group.cost.inference for each in series):
        axes.set_title("training / kept", loc="right", fontsize=6, color=GREY)
    baseline = draw_baseline(axes.axvline, series, [each.group.scores["last"].mean() for each in series])
    put_rows(axes, [each.label for each in series])
    choose_range(axes, series, ("last", "ensemble"))
    axes.set_xlabel("Test top-1 after the last epoch (%)")
    mark = {"color": GREY, "linestyle": "none"}
    handles = [Line2D([], [], marker="o", label="mean", **mark)]  # type: ignore[arg-type]
    if shown["interval"]:
        handles[0].set_label("mean and its 95% interval")
    if shown["run"]:
        handles.append(Line2D([], [], marker=".", label="a run", **mark))  # type: ignore[arg-type]
    if shown["ensemble"]:
        named = {"marker": "D", "fillstyle": "none", "label": "ensemble of peers"}
        handles.append(Line2D([], [], **named, **mark))  # type: ignore[arg-type]
    legend_below(figure, [*handles, *baseline], seeds_of(groups_of(series)))
    return figure


def draw_baseline(draw_line: Any, series: Sequence[Series], values: Sequence[float]) -> list[Line2D]:
    """A line for the baseline across a figure, if there is one of them."""
    found = [value for each, value in zip(series, values, strict=True) if each.group.method == "baseline"]
    if len(found) != 1 or len(series) == 1:
        return []
    color, _ = look("baseline")
    return [draw_line(found[0], color=color, linestyle="--", linewidth=0.9, zorder=0.5, label="baseline")]


def put_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [textwrap.fill(label, LABEL_WIDTH) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def choose_range(axes: Axes, series: Sequence[Series], columns: Sequence[str]) -> None:
    """A range of accuracies that failed settings do not squash; their rows say where they are."""
    spans = []
    for each in series:
        values = each.group.scores[list(columns)].to_numpy().ravel()
        half = np.nan_to_num(mean_interval(each.group.scores["last"]))
        mean = each.group.scores["last"].mean()
        spans.append((min(np.nanmin(values), mean - half), max(np.nanmax(values), mean + half)))
    below = squashing(spans)
    if not below:
        return
    kept = [span for row, span in enumerate(spans) if row not in below]
    low, high = min(low for low, _ in kept), max(high for _, high in kept)
    axes.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    for row in below:
        axes.text(
            *(0.005, row, f"◂ {series[row].group.scores['last'].mean():.2f}"),
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=series[row].style["color"],
        )


def draw_predictors(series: Sequence[Series], place: str) -> Figure | None:
    """Leader, mean peer and ensemble after the last epoch, for each group with peers.

    Where peers differ, each of them in place of their mean.
    """
    series = [each for each in series if "test/ensemble/top1" in each.group.runs[0].data.metrics]
    if not series:
        return None
    predictors = predictors_of(series)
    found = {
        predictor: [
            pd.Series([run.data.metrics.get(f"test/{predictor}/top1", np.nan) for run in each.group.runs])
            for each in series
        ]
        for predictor in predictors
    }
    found = {name: scores for name, scores in found.items() if any(s.notna().any() for s in scores)}
    figure, (axes,) = new_figure(place, height=0.9 + (0.14 + 0.1 * len(found)) * len(series))
    for number, (predictor, scores) in enumerate(found.items()):
        _, fill = predictors[predictor]
        aside = 0.6 / len(found) * (number - (len(found) - 1) / 2)
        for row, (each, those) in enumerate(zip(series, scores, strict=True)):
            bar: dict[str, Any] = {"xerr": those.std()} if len(those) >= FEWEST_SEEDS else {}
            style = each.style | {"linestyle": "none", "fillstyle": fill, "elinewidth": 0.9}
            axes.errorbar(those.mean(), row + aside, capsize=2, markerfacecoloralt="white", **bar, **style)
    put_rows(axes, [each.name for each in series])
    choose_range(axes, series, ("last", "ensemble"))
    axes.set_xlabel("Test top-1 after the last epoch (%)")
    mark = {"color": GREY, "marker": "o", "linestyle": "none", "markerfacecoloralt": "white"}
    handles = [
        Line2D([], [], label=predictors[name][0], fillstyle=predictors[name][1], **mark)  # type: ignore[arg-type]
        for name in found
    ]
    legend_below(figure, handles, deviation_caption(groups_of(series)))
    return figure


def predictors_of(series: Sequence[Series]) -> dict[str, tuple[str, str]]:
    """The predictors to draw, each with its name and how it fills a marker."""
    different = [peer for each in series for peer in runs.different_peers(each.group.runs[0])]
    if not different:
        return PREDICTORS
    fills = dict(zip(dict.fromkeys(peer.predictor for peer in different), cycle(FILLS), strict=False))
    named = {peer.predictor: (for_terminal(peer.name), fills[peer.predictor]) for peer in different}
    return named | {"ensemble": PREDICTORS["ensemble"]}


def draw_against_peers(series: Sequence[Series], history: History, place: str) -> Figure | None:
    """Accuracy and the time of a training step against the number of peers; the baseline as a line."""
    lines: dict[str, list[Series]] = {}
    for each in series:
        lines.setdefault(re.sub(PEERS, "", each.name), []).append(each)
    lines = {name: members for name, members in lines.items() if len(members) > 1}
    if not lines:
        return None
    figure, (accuracy, time) = new_figure(place, 2)
    speeds = {id(each): pd.Series([step_ms(run, history) for run in each.group.runs]) for each in series}
    for number, members in enumerate(lines.values()):
        members = sorted(members, key=lambda each: peer_count(each.group))
        aside = 0.08 * (number - (len(lines) - 1) / 2)  # bars of one count stand side by side
        counts = [peer_count(each.group) + aside for each in members]
        style = members[0].style
        for axes, scores in (
            (accuracy, [each.group.scores["last"] for each in members]),
            (time, [speeds[id(each)] for each in members]),
        ):
            axes.errorbar(
                counts,
                [score.mean() for score in scores],
                yerr=[score.std() if len(score) >= FEWEST_SEEDS else 0 for score in scores],
                label=re.sub(PEERS, "", members[0].label),
                capsize=2,
                **style,
            )
    draw_baseline(accuracy.axhline, series, [each.group.scores["last"].mean() for each in series])
    draw_baseline(time.axhline, series, [speeds[id(each)].mean() for each in series])
    for axes in (accuracy, time):
        axes.set_xlabel("Peers")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracy.set_ylabel("Final test top-1 (%)")
    drawn = [each.group for members in lines.values() for each in members]
    devices = {runs.device(run) for group in drawn for run in group.runs} - {""}
    time.set_ylabel(f"Training step on {' and '.join(sorted(devices)) or 'the device'} (ms)")
    time.set_ylim(bottom=0)
    legend_below(figure, time.get_legend_handles_labels()[0], deviation_caption(drawn))
    return figure


def deviation_caption(groups: Sequence[Group]) -> str:
    """What a point and its bar are."""
    seeds = seeds_of(groups)
    if seeds == "one seed":
        return seeds
    bars = any(len(group.runs) >= FEWEST_SEEDS for group in groups)
    return f"mean{' ± standard deviation' if bars else ''} over {seeds}"


def peer_count(group: Group) -> int:
    return int(group.settings["method.peers"])


def step_ms(run: "Run", history: History) -> float:
    """Median over epochs of the time of a training step; without the first, in which all is warmed up."""
    speed = history(run, "train/images_per_second")
    if len(speed) > 1:
        speed = speed.iloc[1:]
    return 1000 * int(params_of(run)["trainer.batch_size"]) / float(speed.median())
