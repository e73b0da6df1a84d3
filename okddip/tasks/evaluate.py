"""Task `evaluate`: measure what a checkpoint holds, in more detail than a run does after each epoch."""

import json
import logging
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import matplotlib
import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from okddip.data.weaknesses import weaknesses
from okddip.deployment.predictors import default_predictor
from okddip.errors import ConfigError
from okddip.methods.base import Method
from okddip.run.parts import Parts
from okddip.sweeps import teacher
from okddip.tasks.named_checkpoint import chosen_keys, open_checkpoint
from okddip.tasks.train import tracked_to_the_end
from okddip.text import FIGURES, composed, for_terminal
from okddip.training import checkpoint, metrics
from okddip.training.epoch import evaluate_on
from okddip.training.trainer import PRECISIONS
from okddip.trust import trust_of

log = logging.getLogger(__name__)
logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it reports on the fonts it finds

HARDEST = 5  # classes that the terminal names
MOST_LABELS = 40  # classes whose names fit along an axis
MOST_NUMBERS = 20  # classes whose cells have room for a number


def evaluate(config: DictConfig, build: Callable[[DictConfig], Parts]) -> float:
    """Measure all predictors of a checkpoint on its own test set, or on that of another data set.

    The numbers are those the run itself reported where data set, batch size, device and precision are the
    same; of a compiled run, whose evaluation is not compiled here, losses and diversity are so to rounding.
    Leaves `evaluation.json`, `confusion.png` and `confusion.pdf` in the output folder, and an MLflow
    run.

    Args:
        config: resolved. `checkpoint` says what is measured and its configuration how; what the command line
            sets in dataset, trainer and tracking wins.
        build: instantiates the parts of a configuration.

    Returns:
        Top-1 of the primary predictor, in percent.

    Raises:
        ConfigError: there is no such checkpoint, the images are not of its classes and channels, or what it
            holds or answers is not finite.
    """
    settled = ("method", "methods", "model", "optimizer", "scheduler", "experiment", "ablation", "seed")
    chosen = chosen_keys("evaluate", settled)
    path, state = open_checkpoint(config)
    trust_of(config).check(state["config"], path)
    settings = evaluation_settings(config, chosen, state)
    parts = build(settings)
    check_images(settings, state, parts)
    # another data set's training images are not what the network has learned from
    learned = state.get("digests", {}).get("train")
    for weakness in weaknesses(parts.dataset, overlap=learned == parts.dataset.digest("train")):
        log.warning(weakness)
    # normalised as the network learned to see images, whatever this data set's own statistics are
    parts.dataset.mean, parts.dataset.std = tuple(state["mean"]), tuple(state["std"])
    checkpoint.restore(state, group=parts.group, method=parts.method)
    folder = Path(HydraConfig.get().runtime.output_dir)
    with tracked_to_the_end(parts.tracker):
        parts.tracker.start(
            name=f"{config.name}-{settings.name}",
            params={
                "checkpoint": str(config.checkpoint),
                **cast(dict[str, Any], OmegaConf.to_container(settings)),
            },
            tags={
                "kind": "evaluation",  # no training run: tables of those leave it out
                "checkpoint": str(config.checkpoint),
                "folder": str(folder),
                **{name: str(option) for name, option in settings.options.items()},
            },
            config_yaml=OmegaConf.to_yaml(settings),
            command=shlex.join(["okddip", *sys.argv[1:]]),
        )
        results, confusion = measure(parts, state["epoch"])
        shown = default_predictor(parts.method, state["history"])
        matrix = confusion[parts.method.predictors.index(shown)]  # [K, K]
        report = {
            "checkpoint": str(path),
            "epoch": state["epoch"],
            **{name: str(option) for name, option in settings.options.items()},
            "images": int(matrix.sum()),
            "metrics": results,
            "classes": state["classes"],
            "class_accuracy": {
                predictor: class_accuracy(counts)
                for predictor, counts in zip(parts.method.predictors, confusion, strict=True)
            },
            "confusion": {"predictor": shown, "counts": matrix.tolist()},  # a row a true class
        }
        try:
            (folder / "evaluation.json").write_text(
                json.dumps(report, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            draw_confusion(matrix, state["classes"], f"{settings.options.dataset}, {shown}", folder)
        except OSError as error:
            raise ConfigError(
                f"{folder}: evaluation.json, confusion.png and confusion.pdf cannot be written"
                f" ({error.strerror or error}). Make room, or name another folder: hydra.run.dir=PATH."
            ) from error
        parts.tracker.log({f"test/{name}": value for name, value in results.items()}, state["epoch"])
        for name in ("evaluation.json", "confusion.png", "confusion.pdf"):
            parts.tracker.log_artifact(folder / name)
    log.info(
        "checkpoint %s, epoch %d\ndata set   %s, %s test images\ndevice     %s, %s\nfolder     %s",
        *(for_terminal(path), state["epoch"] + 1),
        *(for_terminal(settings.options.dataset), f"{report['images']:,}"),
        *(parts.trainer.device, parts.trainer.precision),
        for_terminal(folder),
    )
    log_tables(report, parts.method)
    return results["top1"]


def evaluation_settings(config: DictConfig, chosen: set[str], state: dict[str, Any]) -> DictConfig:
    """The configuration of a checkpoint with the data set, trainer, tracking and teacher of the command line.

    Args:
        chosen: keys and groups that the command line sets.

    Raises:
        ConfigError: the teacher is nowhere.
    """
    settings = OmegaConf.create(state["config"])
    settings.tracking, settings.trust = config.tracking, config.trust
    for place in (settings.dataset, settings.dataset.get("source")):
        if place and "cache_dir" in place:  # where this machine keeps them; nobody else says where to write
            place.cache_dir = config.dataset.cache_dir
    if "methods.teacher" in chosen:
        settings.method.teacher = config.methods.teacher
    elif settings.method.get("teacher") == "auto":
        settings.method.teacher = find_teacher(settings)
    if "dataset" in chosen:
        settings.dataset = config.dataset
        settings.options.dataset = config.options.dataset
        if config.dataset.image_size is None and "dataset.image_size" not in chosen:
            chosen.add("dataset.image_size")
            config.dataset.image_size = state["image_size"]
        source = config.dataset.get("source") or {}
        if settings.method.get("teacher") and source.get("channels", state["channels"]) == state["channels"]:
            # before the data set meets the teacher, which was asked about images normalised as these
            settings.dataset.mean, settings.dataset.std = state["mean"], state["std"]
    for key in chosen:
        group, _, name = key.partition(".")
        if group in ("dataset", "trainer") and name:
            value = OmegaConf.select(config, key)
            OmegaConf.update(settings, key, value, force_add=True)
            # in a checkpoint ${dataset.root} and the like, by which a source follows, are resolved
            if group == "dataset" and name in settings.dataset.get("source", {}):
                settings.dataset.source[name] = value
    return settings


def find_teacher(settings: DictConfig) -> str:
    """The teacher that the program chose for a run of classic distillation; none is trained here.

    Raises:
        ConfigError: the store has no such run.
    """
    place = teacher.finished_teacher(teacher.teacher_config(settings))
    if place is None:
        raise ConfigError(
            "method.teacher=auto: the store that tracking names has no finished run of this checkpoint's"
            " teacher. Name its checkpoint: methods.teacher=PATH."
        )
    return place


def check_images(settings: DictConfig, state: dict[str, Any], parts: Parts) -> None:
    """Refuse a data set whose classes or channels are not those of the checkpoint.

    Raises:
        ConfigError: names both.
    """
    for what, theirs, ours in (
        ("classes", composed(state["classes"]), composed(parts.dataset.classes)),
        ("image channels", state["channels"], parts.dataset.channels),
    ):
        if theirs != ours:
            raise ConfigError(
                f"dataset={settings.options.dataset}: has {what} {ours}, and the checkpoint was trained on"
                f" dataset={state['config']['options']['dataset']} with {what} {theirs}."
                " Choose a data set with the same ones, or leave dataset out for the checkpoint's own."
            )
    if list(parts.dataset.image_size) != state["image_size"]:
        log.warning(
            "The network was trained on images of %dx%d and is measured on images of %dx%d.",
            *state["image_size"],
            *parts.dataset.image_size,
        )


def measure(parts: Parts, epoch: int) -> tuple[dict[str, float], Tensor]:
    """Measure all predictors on the test set, in one pass.

    Args:
        parts: with the weights of the checkpoint.
        epoch: of the checkpoint; the ramp in its loss.

    Returns:
        The metrics of an evaluation in training and, for each predictor, `cross_entropy` and `ece`, the
        expected calibration error in percent; and the confusion matrices [Q, K, K], row the true class.

    Raises:
        ConfigError: a loss is not finite, or the answers of a predictor.
    """
    trainer, group, method = parts.trainer, parts.group, parts.method
    dtype = PRECISIONS[trainer.precision]

    def step(images: Tensor, labels: Tensor, ramp: Tensor) -> tuple[Tensor, metrics.Sums]:
        with torch.autocast(trainer.device.type, dtype=dtype, enabled=dtype is not None):
            output = group(images)
        losses = method(output, labels, ramp)
        details = {
            "cross_entropy": cross_entropy(losses.predictions, labels),  # [Q]
            "gaps": metrics.calibration_gaps(losses.predictions, labels),  # [Q, bins]
            "confusion": count_confusion(losses.predictions, labels),  # [Q, K, K]
        }
        return losses.total, metrics.count(losses, labels, method.auxiliary) | details

    trainer.set_backend_flags()
    loader = parts.dataset.eval_loader("test", trainer.eval_batch_size, trainer.device, trainer.channels_last)
    ramp = torch.tensor(method.ramp(epoch), device=trainer.device)
    with trainer.progress(loader.batches(), len(loader), "test") as batches:
        sums = evaluate_on(group, method, step, batches, ramp)
    entropies = sums.pop("cross_entropy") / sums["images"]  # [Q]
    errors = 100 * sums.pop("gaps").abs().sum(1) / sums["images"]  # [Q]
    confusion = sums.pop("confusion").cpu()
    broken = metrics.broken_losses(sums)
    broken += [name for name, value in zip(method.predictors, entropies, strict=True) if not value.isfinite()]
    if broken:
        raise ConfigError(
            f"checkpoint, epoch {epoch + 1}: on these images {', '.join(broken)} is not finite, so that no"
            " accuracy means anything. trainer.precision=fp32 may help; else name another checkpoint, such as"
            " previous.pt or best.pt beside it."
        )
    results = metrics.read(sums, method)
    for name, values in (("cross_entropy", entropies), ("ece", errors)):
        by_predictor = zip(method.predictors, values.tolist(), strict=True)
        results |= {f"{predictor}/{name}": value for predictor, value in by_predictor}
    return results, confusion


def cross_entropy(predictions: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each predictor, summed over the samples: [Q, B, K] and [B] to [Q]."""
    every = labels.expand(len(predictions), -1)  # [Q, B]
    return F.cross_entropy(predictions.transpose(1, 2), every, reduction="none").double().sum(1)


def count_confusion(predictions: Tensor, labels: Tensor) -> Tensor:
    """How many samples of each class (row) were taken for each class: [Q, B, K] and [B] to [Q, K, K]."""
    predictors, _, classes = predictions.shape
    cells = labels * classes + predictions.argmax(-1)  # [Q, B]
    counts = cells.new_zeros(predictors, classes * classes)
    return counts.scatter_add_(1, cells, torch.ones_like(cells)).view(predictors, classes, classes)


def class_accuracy(counts: Tensor) -> list[float | None]:
    """Share of each class that was recognised, in percent; None for a class without images."""
    shares = zip(counts.diagonal().tolist(), counts.sum(1).tolist(), strict=True)
    return [100 * right / images if images else None for right, images in shares]


def draw_confusion(counts: Tensor, classes: list[str], title: str, folder: Path) -> None:
    """Draw a confusion matrix [K, K] into `confusion.png` and `confusion.pdf`, each row as shares."""
    size = len(classes)
    classes = list(map(for_terminal, classes))
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp_min(1)
    inches = min(max(5.0, 0.3 * size), 14.0)
    with matplotlib.rc_context(FIGURES), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", "Glyph")  # of a script that the font has not
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
    """Print the predictors' figures, diversity and the classes that are hardest."""
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
