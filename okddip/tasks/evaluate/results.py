"""Show the results of an evaluation: tables in the terminal, the confusion matrix as a figure."""

import logging
import warnings
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from okddip.methods.base import Method
from okddip.text import FIGURES, for_terminal

log = logging.getLogger(__name__)
logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it reports on the fonts it finds

HARDEST = 5  # classes that the terminal names
MOST_LABELS = 40  # classes whose names fit along an axis
MOST_NUMBERS = 20  # classes whose cells have room for a number


def draw_confusion(counts: Tensor, classes: list[str], title: str, folder: Path) -> None:
    """Draw a confusion matrix [K, K] into `confusion.png` and `confusion.pdf`, each row as shares."""
    size = len(classes)
    classes = list(map(for_terminal, classes))
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp_min(1)
    inches = min(max(5.0, 0.3 * size), 14.0)
    with matplotlib.rc_context(FIGURES), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", "Glyph")  # the font lacks some scripts
        figure = Figure(figsize=(inches + 1, inches), dpi=150, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(image, ax=axes, label="share of the true class (%)", shrink=0.8)
        axes.set(title=for_terminal(title), xlabel="predicted class", ylabel="true class")
        if size <= MOST_LABELS:
            axes.set_xticks(range(size), classes, rotation=90)
            axes.set_yticks(range(size), classes)
        if size <= MOST_NUMBERS:
            for row, column in counts.nonzero().tolist():
                colour = "white" if shares[row, column] > 50 else "black"
                number = str(counts[row, column].item())
                axes.text(column, row, number, ha="center", va="center", color=colour, fontsize=7)
        for name in ("confusion.png", "confusion.pdf"):
            figure.savefig(folder / name)


def log_tables(report: dict[str, Any], method: Method) -> None:
    """Print the numbers of all predictors, the diversity and the hardest classes."""
    results = report["metrics"]
    columns = {"top1": "top-1 (%)", "top5": "top-5 (%)", "cross_entropy": "cross-entropy", "ece": "ECE (%)"}
    rows = [f"{'test':<16}" + "".join(f"{name:>15}" for name in columns.values())]
    for predictor in [*method.predictors, *(["mean"] if method.peers > 1 else [])]:
        cells = [results.get(f"{predictor}/{name}") for name in columns]
        mark = " *" if predictor == method.primary else ""
        numbers = "".join(f"{'' if cell is None else format(cell, '.3f'):>15}" for cell in cells)
        rows.append(f"{predictor + mark:<16}{numbers}")
    log.info("%s\n* primary", "\n".join(rows))
    losses = [f"{name} {value:.4f}" for name, value in results.items() if name.endswith("loss")]
    log.info("losses     %s", ", ".join(losses))
    if "diversity" in results:
        log.info("diversity  %.4f", results["diversity"])
    shown = report["confusion"]["predictor"]
    accuracies = zip(report["class_accuracy"][shown], report["classes"], strict=True)
    hardest = sorted((accuracy, name) for accuracy, name in accuracies if accuracy is not None)[:HARDEST]
    named = ", ".join(f"{for_terminal(name)} {accuracy:.1f} %" for accuracy, name in hardest)
    log.info("hardest    %s (%s)", named, shown)
