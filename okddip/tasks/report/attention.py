"""The figure of OKDDip's attention: who asks whom, over the epochs."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from okddip.tasks.attention import ENTRY, FILE, TAG
from okddip.tasks.report import runs
from okddip.tasks.report.compare import Group
from okddip.tasks.report.styles import DPI, RC_PARAMS
from okddip.text import for_terminal

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

MOST_SEEDS, MOST_EPOCHS = 3, 4  # of matrices in one figure

History = Callable[["Run", str], pd.Series]  # all points of a metric: index epoch from 1 on


def draw_attention(group: Group, history: History, title: str) -> Figure | None:
    """OKDDip's attention, mean over the test images: a row a seed, columns from the first epoch to the last.

    Not averaged over seeds: the second peer of one seed has nothing to do with that of another.
    """
    matrices = {runs.seed(run): attention_by_epoch(run, history) for run in group.runs}
    return draw_matrices({seed: by_epoch for seed, by_epoch in matrices.items() if by_epoch}, title)


def save_matrices(matrices: dict[str, dict[int, np.ndarray]], title: str, path: Path) -> None:
    """Draw the attention of runs, by seed and epoch, into a file."""
    with matplotlib.rc_context(RC_PARAMS):  # type: ignore[arg-type]
        if figure := draw_matrices(matrices, for_terminal(title)):
            figure.savefig(path, dpi=DPI)


def draw_matrices(matrices: dict[str, dict[int, np.ndarray]], title: str) -> Figure | None:
    """Attention [A asks, A is asked] by seed and epoch."""
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
    for axes, epoch in zip(grid[0], epochs, strict=True):
        axes.set_title(f"epoch {epoch}", fontsize=9)
    for row, seed in zip(grid, seeds, strict=True):
        for axes, epoch in zip(row, epochs, strict=True):
            matrix = matrices[seed][epoch]
            image = axes.imshow(matrix, vmin=0, vmax=1, cmap="cividis")
            axes.grid(visible=False)
            axes.set_xticks(range(count))
            axes.set_yticks(range(count))
            if count <= 4:
                for (asks, answers), weight in np.ndenumerate(matrix):
                    color = "black" if weight > 0.6 else "white"
                    axes.text(
                        answers, asks, f"{weight:.2f}", ha="center", va="center", color=color, fontsize=7
                    )
        row[0].set_ylabel(f"seed {seed}")
    figure.supxlabel("key: auxiliary peer that is asked", fontsize=9)
    figure.supylabel("query: auxiliary peer that asks", fontsize=9)
    figure.colorbar(image, ax=grid, label="attention weight (rows sum to 1)", shrink=0.8)
    return figure


def has_attention(group: Group) -> bool:
    """Whether there was attention; without it (`method.attention=false`) runs log that all count the same."""
    if group.settings.get("method.attention") == "false":
        return False
    return any(entry_names(run) for run in group.runs)


def attention_by_epoch(run: "Run", history: History) -> dict[int, np.ndarray]:
    """The matrices of a run by epoch, [A asks, A is asked]; none if it has none."""
    series = {name: history(run, name) for name in entry_names(run)}
    if not series:
        return {}
    places = {name: tuple(map(int, name.split("/")[2:])) for name in series}
    entries = pd.DataFrame({places[name]: values for name, values in series.items()}).dropna()
    return {int(epoch): row.unstack().to_numpy() for epoch, row in entries.iterrows()}


def entry_names(run: "Run") -> list[str]:
    """The names of a run's entries for the test images: in its file, or in an older run as metrics."""
    if size := run.data.tags.get(TAG, "").partition("x")[0]:
        peers = range(int(size) if size.isdecimal() else 0)
        return [f"test/attention/{asks}/{is_asked}" for asks in peers for is_asked in peers]
    return [name for name in run.data.metrics if name.startswith("test/") and ENTRY.fullmatch(name)]


def read_attention(client: "MlflowClient", run: "Run") -> dict[str, pd.Series]:
    """The entries of a run's file by epoch, counted from 1; none if it cannot be had."""
    from mlflow.exceptions import MlflowException

    try:
        table = pd.read_csv(client.download_artifacts(run.info.run_id, FILE))
        return {
            f"{split}/attention/{asks}/{is_asked}": entries.set_index("epoch")["weight"].astype(float)
            for (split, asks, is_asked), entries in table.groupby(["split", "asks", "is_asked"])
        }
    except (MlflowException, OSError, ValueError, KeyError) as error:
        log.warning("%s of MLflow run %s cannot be read: %s", FILE, run.info.run_id, for_terminal(error))
        return {}
