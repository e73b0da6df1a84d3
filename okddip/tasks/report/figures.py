"""Figures of a comparison, one file each as PNG and PDF.

Colours are those of Okabe and Ito (Color Universal Design, 2008) without yellow, which white paper swallows;
a marker and a line style say the same as a colour. Figures are drawn without pyplot, whose state is global.
"""

import hashlib
import logging
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from okddip.signals import raise_deferred_stop
from okddip.tasks.report import runs
from okddip.tasks.report.compare import Comparison, Group
from okddip.text import FIGURES, for_terminal
from okddip.tracking.params import params_of

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

COLORS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
PREDICTORS = {"leader": "group leader", "mean": "mean peer", "ensemble": "ensemble of peers"}
RC_PARAMS = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # letters stay letters in the PDF
    **FIGURES,
}
WIDTH, HEIGHT = 6.3, 2.8  # inches; the text width of A4, and a height to which a legend adds
LEGEND_ROW = 0.18  # inches
DPI = 200
FEWEST_EPOCHS_TO_MAGNIFY = 8
ATTENTION = re.compile(r"test/attention/(\d+)/(\d+)")
MAX_NAME_BYTES = 150  # most file systems take 255 with an ending
MOST_ATTENTION = 8  # figures of attention for one data set and model
MOST_SEEDS, MOST_EPOCHS = 3, 4  # of attention matrices in one figure

log = logging.getLogger(__name__)

# all points of a metric: index epoch from 1 on
History = Callable[["Run", str], pd.Series]


def write_figures(client: "MlflowClient", comparisons: Sequence[Comparison], folder: Path) -> None:
    """Write the figures that the runs' metrics allow, for each data set and model."""

    @cache
    def history(run_id: str, metric: str) -> pd.Series:
        return runs.metric_history(client, run_id, metric).rename(lambda epoch: epoch + 1)

    def of_run(run: "Run", metric: str) -> pd.Series:
        return history(run.info.run_id, metric)

    written: set[str] = set()
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it logs each letter in a PDF
    with matplotlib.rc_context(RC_PARAMS):  # type: ignore[arg-type]
        for comparison in comparisons:
            for model in dict.fromkeys(group.settings["model"] for group in comparison.groups):
                name = f"{comparison.dataset}-{model}"
                for kind, figure in draw(comparison, model, of_run).items():
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
    groups = {
        for_terminal(comparison.label(group)): group
        for group in comparison.groups
        if group.settings["model"] == model
    }
    place = for_terminal(f"{comparison.dataset}, {model}")
    figures = {
        "accuracy": draw_over_epochs(groups, history, "test/top1", "Test top-1 (%)", place),
        "diversity": draw_over_epochs(
            groups,
            history,
            "test/diversity",
            "Diversity (mean L2 distance\nof peers' softmax outputs)",
            place,
        ),
        "predictors": draw_predictors(groups, place),
        "peers": draw_against_peers(groups, history, place),
    }
    attentive = [label for label, group in groups.items() if any(has_attention(run) for run in group.runs)]
    for label in attentive[:MOST_ATTENTION]:
        figures[f"attention-{label}"] = draw_attention(groups[label], history, f"{label} on {place}")
    if len(attentive) > MOST_ATTENTION:
        log.info(
            "%s: attention is drawn of the first %d of %d settings; report.where chooses others.",
            *(place, MOST_ATTENTION, len(attentive)),
        )
    return {kind: figure for kind, figure in figures.items() if figure is not None}


def draw_over_epochs(
    groups: dict[str, Group], history: History, metric: str, name: str, place: str
) -> Figure | None:
    """A metric against the epoch: the mean over seeds, in a band of one standard deviation.

    A second panel shows the end of the run, whose differences the first epochs' range would hide.
    """
    tables = {
        label: pd.DataFrame({runs.seed(run): history(run, metric) for run in group.runs}).dropna(how="all")
        for label, group in groups.items()
    }
    numbers = {label: number for number, label in enumerate(tables)}  # the same style in all figures
    tables = {label: table for label, table in tables.items() if not table.empty}
    if not tables:
        return None
    last = max(int(table.index[-1]) for table in tables.values())
    starts = [0] if last < FEWEST_EPOCHS_TO_MAGNIFY else [0, last - last // 4]
    most = 100 if metric.endswith("top1") else None
    figure, panels = new_figure(place, len(starts))
    for axes, start in zip(panels, starts, strict=True):
        for label, table in tables.items():
            shown = table[table.index >= start]
            mean, std = shown.mean(axis=1), shown.std(axis=1).fillna(0)
            style = style_of(numbers[label]) | {"markevery": max(1, len(mean) // 8)}
            axes.plot(mean.index, mean, label=label, **style)
            low, high = (mean - std).clip(lower=0), (mean + std).clip(upper=most)
            axes.fill_between(mean.index, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axes.set_xlabel("Epoch (last quarter)" if start else "Epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if last == 1:
            axes.set_xlim(0, 2)
    panels[0].set_ylabel(name)
    legend_below(figure, panels[0], seeds_caption(groups[label] for label in tables))
    return figure


def draw_predictors(groups: dict[str, Group], place: str) -> Figure | None:
    """Leader, mean peer and ensemble after the last epoch, for each group with peers."""
    with_peers = {
        label: group for label, group in groups.items() if "test/ensemble/top1" in group.runs[0].data.metrics
    }
    if not with_peers:
        return None
    figure, (axes,) = new_figure(place, height=0.9 + 0.4 * len(with_peers))
    rows = np.arange(len(with_peers))
    for number, (predictor, name) in enumerate(PREDICTORS.items()):
        scores = [
            pd.Series([run.data.metrics.get(f"test/{predictor}/top1", np.nan) for run in group.runs])
            for group in with_peers.values()
        ]
        style = style_of(number) | {"linestyle": "none"}
        axes.errorbar(
            [score.mean() for score in scores],
            rows + 0.22 * (number - 1),
            xerr=[score.std() if len(score) > 1 else 0 for score in scores],
            label=name,
            capsize=2,
            **style,
        )
    axes.set_yticks(rows, [textwrap.fill(label, 30) for label in with_peers])
    axes.set_ylim(len(with_peers) - 0.5, -0.5)
    axes.set_xlabel("Test top-1 after the last epoch (%)")
    axes.grid(axis="y", visible=False)
    legend_below(figure, axes, seeds_caption(with_peers.values()))
    return figure


def draw_against_peers(groups: dict[str, Group], history: History, place: str) -> Figure | None:
    """Accuracy and the time of a training step against the number of peers."""
    series: dict[str, list[Group]] = {}
    for label, group in groups.items():
        series.setdefault(re.sub(r", \d+ peers", "", label), []).append(group)
    series = {label: members for label, members in series.items() if len(members) > 1}
    if not series:
        return None
    figure, (accuracy, time) = new_figure(place, 2)
    devices: set[str] = set()
    for number, (label, members) in enumerate(series.items()):
        members = sorted(members, key=peer_count)
        aside = 0.08 * (number - (len(series) - 1) / 2)  # bars of one count stand side by side
        counts = [peer_count(group) + aside for group in members]
        times = [pd.Series([step_ms(run, history) for run in group.runs]) for group in members]
        tags = (runs.tag(run, "device") or "" for group in members for run in group.runs)
        devices |= {tag.partition(":")[0] for tag in tags} - {""}  # jobs side by side: cuda:0, cuda:1
        for axes, scores in ((accuracy, [group.scores["last"] for group in members]), (time, times)):
            axes.errorbar(
                counts,
                [score.mean() for score in scores],
                yerr=[score.std() if len(score) > 1 else 0 for score in scores],
                label=label,
                capsize=2,
                **style_of(number),
            )
    for axes in (accuracy, time):
        axes.set_xlabel("Peers")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracy.set_ylabel("Final test top-1 (%)")
    named = for_terminal(" and ".join(sorted(devices)) or "the device")
    time.set_ylabel(f"Training step on {named} (ms)")
    time.set_ylim(bottom=0)
    legend_below(figure, time, seeds_caption(group for members in series.values() for group in members))
    return figure


def peer_count(group: Group) -> int:
    return int(group.settings["method.peers"])


def step_ms(run: "Run", history: History) -> float:
    """Median over epochs of the time of a training step; without the first, in which all is warmed up."""
    speed = history(run, "train/images_per_second")
    if len(speed) > 1:
        speed = speed.iloc[1:]
    return 1000 * int(params_of(run)["trainer.batch_size"]) / float(speed.median())


def draw_attention(group: Group, history: History, title: str) -> Figure | None:
    """OKDDip's attention, mean over the test images: a row a seed, columns from the first epoch to the last.

    Not averaged over seeds: the second peer of one seed has nothing to do with that of another.
    """
    matrices = {runs.seed(run): attention_by_epoch(run, history) for run in group.runs}
    matrices = {seed: by_epoch for seed, by_epoch in matrices.items() if by_epoch}
    if not matrices:
        return None
    seeds = list(matrices)[:MOST_SEEDS]
    known = sorted(set.intersection(*(set(matrices[seed]) for seed in seeds)))
    picked = np.linspace(0, len(known) - 1, min(MOST_EPOCHS, len(known))).round().astype(int)
    epochs = [known[position] for position in picked]
    count = len(matrices[seeds[0]][epochs[0]])
    side = 1.3
    figure = Figure(figsize=(side * len(epochs) + 1.2, side * len(seeds) + 0.8), layout="constrained")
    figure.suptitle(title, fontsize=9)
    grid = figure.subplots(len(seeds), len(epochs), squeeze=False, sharex=True, sharey=True)
    most = max(matrices[seed][epoch].max() for seed in seeds for epoch in epochs)
    for axes, epoch in zip(grid[0], epochs, strict=True):
        axes.set_title(f"epoch {epoch}", fontsize=9)
    for row, seed in zip(grid, seeds, strict=True):
        for axes, epoch in zip(row, epochs, strict=True):
            matrix = matrices[seed][epoch]
            image = axes.imshow(matrix, vmin=0, vmax=most, cmap="cividis")
            axes.grid(visible=False)
            axes.set_xticks(range(count))
            axes.set_yticks(range(count))
            if count <= 4:
                for (asks, answers), weight in np.ndenumerate(matrix):
                    color = "black" if weight > 0.6 * most else "white"
                    axes.text(
                        answers, asks, f"{weight:.2f}", ha="center", va="center", color=color, fontsize=7
                    )
        row[0].set_ylabel(f"seed {seed}")
    figure.supxlabel("auxiliary peer that is asked", fontsize=9)
    figure.supylabel("auxiliary peer that asks", fontsize=9)
    figure.colorbar(image, ax=grid, label="attention weight (rows sum to 1)", shrink=0.8)
    return figure


def has_attention(run: "Run") -> bool:
    return any(ATTENTION.fullmatch(name) for name in run.data.metrics)


def attention_by_epoch(run: "Run", history: History) -> dict[int, np.ndarray]:
    """The matrices of a run by epoch, [A asks, A answers]; none if it logged none."""
    names = {name: match for name in run.data.metrics if (match := ATTENTION.fullmatch(name))}
    if not names:
        return {}
    entries = pd.DataFrame(
        {(int(match[1]), int(match[2])): history(run, name) for name, match in names.items()}
    ).dropna()
    return {int(epoch): row.unstack().to_numpy() for epoch, row in entries.iterrows()}


def new_figure(title: str, panels: int = 1, height: float = HEIGHT) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, fontsize=9)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def style_of(number: int) -> dict[str, Any]:
    """Colour, marker and line of a series; none of the first 280 looks like another."""
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number % len(LINES)],
        "markersize": 4,
        "linewidth": 1.3,
    }


def legend_below(figure: Figure, axes: Axes, title: str) -> None:
    """Under the axes, where it covers no line; the figure grows by its rows."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) > 28 else 3
    labels = [textwrap.fill(label, 40) for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=title)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * (1 + math.ceil(len(labels) / columns)))


def seeds_caption(groups: Iterable[Group]) -> str:
    """What a point and its bar or band are."""
    counts = sorted({len(group.runs) for group in groups})
    if counts == [1]:
        return "one seed"
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"mean ± standard deviation over {seeds} seeds"
