"""Show the results of an evaluation: tables in the terminal and as CSV, the confusion matrix as a figure."""

import csv
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from okddip.deployment.predictors import with_models
from okddip.methods.base import Method
from okddip.tasks.evaluate.measure import Answers
from okddip.text import FIGURES, for_csv, for_terminal

log = logging.getLogger(__name__)
logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it reports on the fonts it finds

HARDEST = 5  # classes that the terminal names
MOST_LABELS = 40  # classes whose names fit along an axis
MOST_NUMBERS = 20  # classes whose cells have room for a number
CONFUSION = ("confusion.png", "confusion.pdf")  # files


def write_predictions(
    answers: Answers, predictors: Sequence[str], classes: Sequence[str], files: Sequence[str], path: Path
) -> None:
    """Write a table in long form: a line an image and predictor.

    Columns are index (of the image in its split), file, label, predictor, prediction and its probability.

    Args:
        files: of the split, [N]; without them there is no such column.
        path: of the file.
    """
    names = [for_csv(name) for name in classes]
    labels = [names[label] for label in answers.labels.tolist()]
    images = [[index, *([for_csv(files[index])] if files else [])] for index in answers.images.tolist()]
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        columns = ["label", "predictor", "prediction", "probability"]
        rows.writerow(["index", *(["file"] if files else []), *columns])
        everything = (images, labels, answers.predictions.T.tolist(), answers.probabilities.T.tolist())
        for image, label, predictions, probabilities in zip(*everything, strict=True):
            for each in zip(predictors, predictions, probabilities, strict=True):
                predictor, prediction, probability = each
                rows.writerow([*image, label, predictor, names[prediction], f"{probability:.6g}"])


def draw_confusion(report: dict[str, Any], folder: Path) -> None:
    """Draw the confusion matrix of a report into `confusion.png` and `confusion.pdf`, each row as shares."""
    counts = np.array(report["confusion"]["counts"])  # [K, K]
    shown = report["confusion"]["predictor"]
    model = report.get("models", {}).get(shown.removeprefix("ema/"), report["model"])
    what = for_terminal(f"{model} on {report['dataset']}")
    accuracy = f"top-1 {report['metrics'][f'{shown}/top1']:.2f} %, n = {report['images']:,}"
    classes = list(map(for_terminal, report["classes"]))
    size = len(classes)
    shares = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    inches = min(max(5.0, 0.3 * size), 14.0)
    with matplotlib.rc_context(FIGURES), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", "Glyph")  # the font lacks some scripts
        figure = Figure(figsize=(inches + 1, inches), dpi=150, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(image, ax=axes, label="share of the true class (%)", shrink=0.8)
        axes.set(title=f"{what}\n{shown}: {accuracy}", xlabel="predicted class", ylabel="true class")
        if size <= MOST_LABELS:
            axes.set_xticks(range(size), classes, rotation=90)
            axes.set_yticks(range(size), classes)
        if size <= MOST_NUMBERS:
            for row, column in zip(*counts.nonzero(), strict=True):
                colour = "white" if shares[row, column] > 50 else "black"
                axes.text(
                    column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=7
                )
        for name in CONFUSION:
            figure.savefig(folder / name)


def log_tables(report: dict[str, Any], method: Method, models: Sequence[str] | None = None) -> None:
    """Print the numbers of all predictors, the diversity and the hardest classes.

    Args:
        models: of the peers, where they differ.
    """
    results = report["metrics"]
    columns = {
        **{"top1": "top-1 (%)", "top5": "top-5 (%)", "balanced_accuracy": "balanced (%)"},
        **{"macro_f1": "macro F1 (%)", "cross_entropy": "cross-entropy", "ece": "ECE (%)"},
    }
    named = with_models(method, models) | {mean: mean for mean in method.means}
    named[method.primary] += " *"
    width = max(16, *(len(name) + 2 for name in named.values()))
    rows = [f"{'test':<{width}}" + "".join(f"{name:>14}" for name in columns.values())]
    for predictor, label in named.items():
        cells = [results.get(f"{predictor}/{metric}") for metric in columns]
        numbers = "".join(f"{'' if cell is None else format(cell, '.3f'):>14}" for cell in cells)
        rows.append(f"{for_terminal(label):<{width}}{numbers}")
    log.info("%s\n* primary", "\n".join(rows))
    losses = [f"{name} {value:.4f}" for name, value in results.items() if name.endswith("loss")]
    log.info("losses     %s", ", ".join(losses))
    if "diversity" in results:
        log.info("diversity  %.4f", results["diversity"])
    shown = report["confusion"]["predictor"]
    accuracies = zip(report["class_accuracy"][shown], report["classes"], strict=True)
    hardest = sorted((accuracy, name) for accuracy, name in accuracies if accuracy is not None)[:HARDEST]
    listed = ", ".join(f"'{for_terminal(name)}' {accuracy:.1f} %" for accuracy, name in hardest)
    log.info("hardest    %s (%s)", listed, shown)
