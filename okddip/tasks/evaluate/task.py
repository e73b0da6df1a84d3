"""Task `evaluate`: measure what a checkpoint holds, in more detail than a run does after each epoch."""

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from sklearn.metrics import confusion_matrix

from okddip import invocation
from okddip.assembly import PEERS
from okddip.data.weaknesses import weaknesses
from okddip.deployment.predictors import default_predictor
from okddip.errors import ConfigError
from okddip.older_versions import FIRST_EPOCH
from okddip.run.parts import Parts
from okddip.tasks.evaluate.images import check_images, name_absent_classes, other_images
from okddip.tasks.evaluate.measure import Answers, class_accuracy, measure, most_confused
from okddip.tasks.evaluate.results import CONFUSION, draw_confusion, log_tables, write_predictions
from okddip.tasks.evaluate.settings import evaluation_settings
from okddip.tasks.named_checkpoint import chosen_keys, open_checkpoint
from okddip.text import for_terminal
from okddip.tracking.status import log_how_to_open, tracked_to_the_end
from okddip.training import checkpoint
from okddip.training.peers import saved_parts
from okddip.training.threads import computing_with
from okddip.trust import trust_of

log = logging.getLogger(__name__)

# Groups that a checkpoint settles, and the command may not set
SETTLED = ("method", "methods", "model", "optimizer", "scheduler", "experiment", "ablation", "seed")
MOST_IN_MATRIX = 1000  # classes; beyond, a confusion matrix is larger than all else
MOST_CONFUSED = 1000  # pairs of classes that are written in its place


def evaluate(config: DictConfig, build: Callable[..., Parts]) -> float:
    """Measure all predictors of a checkpoint on its own test set, or on that of another data set.

    The numbers equal those that the run itself reported where data set, batch size, device and precision are
    the same; for a compiled run, whose evaluation is not compiled here, losses and diversity are equal up to
    rounding. Writes `evaluation.json`, `predictions.csv`, `confusion.png` and `confusion.pdf` into the output
    folder, and logs an MLflow run.

    Args:
        config: resolved. `checkpoint` names what is measured; how comes from its configuration, except for
            what the command line sets in dataset, trainer and tracking.
        build: instantiates the parts of a configuration; see `okddip.main.build`.

    Returns:
        Top-1 of the primary predictor, in percent.

    Raises:
        ConfigError: there is no such checkpoint, the images have classes that it does not know or other
            channels, or its losses are not finite.
    """
    chosen = chosen_keys("evaluate", SETTLED)
    source, state = open_checkpoint(config)
    trust_of(config).check(state["config"], source)
    settings = evaluation_settings(config, chosen, state)
    is_other = bool(chosen & {"dataset", "dataset.root"})
    parts = build(settings, partial(other_images, state=state)) if is_other else build(settings)
    check_images(settings, state, parts.dataset)
    if is_other:
        name_absent_classes(parts.dataset)
    # other training images are not what the network has learned from
    learned = state.get("digests", {}).get("train")
    overlap = not is_other and learned == parts.dataset.digest("train")
    for weakness in weaknesses(parts.dataset, overlap=overlap):
        log.warning(weakness)
    # normalised as the network learned to see images, whatever this data set's own statistics are
    parts.dataset.mean, parts.dataset.std = tuple(state["mean"]), tuple(state["std"])
    checkpoint.restore(state, **saved_parts(parts.group, parts.method))
    folder = Path(HydraConfig.get().runtime.output_dir)
    options = {name: str(option) for name, option in settings.options.items()}
    with computing_with(parts.trainer.threads), tracked_to_the_end(parts.tracker):
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
                FIRST_EPOCH: "1",
                **options,
            },
            config_yaml=OmegaConf.to_yaml(settings),
            command=invocation.command(),
        )
        report, answers = report_on(parts, state, source, options, settings.model.get(PEERS))
        written = write_report(report, answers, parts, folder)
        metrics = {f"test/{name}": value for name, value in report["metrics"].items()}
        parts.tracker.log(metrics, state["epoch"] + 1)
        for path in written:
            parts.tracker.log_artifact(path)
    log.info(
        "checkpoint %s, epoch %d\ndata set   %s, %s test images\ndevice     %s, %s\nfolder     %s",
        *(for_terminal(source), state["epoch"] + 1),
        *(for_terminal(settings.options.dataset), f"{report['images']:,}"),
        *(parts.trainer.device, parts.trainer.precision),
        for_terminal(folder),
    )
    log_tables(report, parts.method, settings.model.get(PEERS))
    log_how_to_open(parts.tracker)
    return report["metrics"]["top1"]


def report_on(
    parts: Parts,
    state: dict[str, Any],
    source: str,
    options: dict[str, str],
    models: Sequence[str] | None = None,
) -> tuple[dict[str, Any], Answers]:
    """Measure a checkpoint; all numbers, as `evaluation.json` has them, and the answers they are made of.

    Args:
        parts: with the weights of the checkpoint.
        state: the checkpoint.
        source: where the checkpoint is, a file or `runs:/ID`.
        options: model, method and data set.
        models: of the peers, where they differ.
    """
    results, answers = measure(parts, state["epoch"])
    predictors, classes = parts.method.measured, state["classes"]
    shown = default_predictor(parts.method, state["history"])
    predictions = answers.predictions[predictors.index(shown)]  # [N]
    confusion: dict[str, Any] = {"predictor": shown}
    networks = dict(zip(parts.method.predictors, models or (), strict=False))
    if len(classes) <= MOST_IN_MATRIX:
        everything = range(len(classes))
        counts = confusion_matrix(answers.labels, predictions, labels=everything)
        confusion["counts"] = counts.tolist()  # a row a true class
    else:
        confusion["most_frequent"] = [
            {"class": classes[label], "predicted": classes[prediction], "images": count}
            for label, prediction, count in most_confused(answers.labels, predictions, MOST_CONFUSED)
        ]
    report = {
        "checkpoint": source,
        "epoch": state["epoch"] + 1,
        **options,
        **({"models": networks} if models else {}),
        "images": len(answers.labels),
        "metrics": results,
        "classes": classes,
        "class_accuracy": {
            predictor: class_accuracy(answers.labels, theirs, len(classes))
            for predictor, theirs in zip(predictors, answers.predictions, strict=True)
        },
        "confusion": confusion,
    }
    return report, answers


def write_report(report: dict[str, Any], answers: Answers, parts: Parts, folder: Path) -> list[Path]:
    """Write the numbers, the answers and a figure of the confusion matrix, unless it has too many classes.

    Returns:
        The files.

    Raises:
        ConfigError: the folder cannot be written.
    """
    classes = report["classes"]
    is_drawn = "counts" in report["confusion"]
    names = ["evaluation.json", "predictions.csv", *(CONFUSION if is_drawn else ())]
    try:
        text = json.dumps(report, ensure_ascii=False) + "\n"
        (folder / "evaluation.json").write_text(text, encoding="utf-8")
        files = getattr(parts.dataset, "test_files", ())
        write_predictions(answers, parts.method.measured, classes, files, folder / "predictions.csv")
        if is_drawn:
            draw_confusion(report, folder)
    except OSError as error:
        raise ConfigError(
            f"{folder}: {', '.join(names)} cannot be written"
            f" ({error.strerror or error}). Make room, or name another folder: hydra.run.dir=PATH."
        ) from error
    if not is_drawn:
        log.info(
            "%s classes are too many for a confusion matrix: no figure of it is drawn, and evaluation.json"
            " has the %s most frequent mistakes in its place. predictions.csv has all of them.",
            *(f"{len(classes):,}", f"{len(report['confusion']['most_frequent']):,}"),
        )
    return [folder / name for name in names]
