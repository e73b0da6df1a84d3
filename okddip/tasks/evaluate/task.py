"""Task `evaluate`: measure what a checkpoint holds, in more detail than a run does after each epoch."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from okddip import invocation
from okddip.data.weaknesses import weaknesses
from okddip.deployment.predictors import default_predictor
from okddip.errors import ConfigError
from okddip.run.parts import Parts
from okddip.tasks.evaluate.measure import class_accuracy, measure
from okddip.tasks.evaluate.results import draw_confusion, log_tables
from okddip.tasks.evaluate.settings import check_images, evaluation_settings
from okddip.tasks.named_checkpoint import chosen_keys, open_checkpoint
from okddip.text import for_terminal
from okddip.tracking.status import tracked_to_the_end
from okddip.training import checkpoint
from okddip.trust import trust_of

log = logging.getLogger(__name__)

# Groups that a checkpoint settles, and the command may not set
SETTLED = ("method", "methods", "model", "optimizer", "scheduler", "experiment", "ablation", "seed")
FILES = ("evaluation.json", "confusion.png", "confusion.pdf")


def evaluate(config: DictConfig, build: Callable[[DictConfig], Parts]) -> float:
    """Measure all predictors of a checkpoint on its own test set, or on that of another data set.

    The numbers equal those that the run itself reported where data set, batch size, device and precision are
    the same; for a compiled run, whose evaluation is not compiled here, losses and diversity are equal up to
    rounding. Writes `evaluation.json`, `confusion.png` and `confusion.pdf` into the output folder, and logs
    an MLflow run.

    Args:
        config: resolved. `checkpoint` names what is measured; how comes from its configuration, except for
            what the command line sets in dataset, trainer and tracking.
        build: instantiates the parts of a configuration.

    Returns:
        Top-1 of the primary predictor, in percent.

    Raises:
        ConfigError: there is no such checkpoint, the images have other classes or channels than its own, or
            its losses are not finite.
    """
    chosen = chosen_keys("evaluate", SETTLED)
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
    options = {name: str(option) for name, option in settings.options.items()}
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
                **options,
            },
            config_yaml=OmegaConf.to_yaml(settings),
            command=invocation.command(),
        )
        results, confusion = measure(parts, state["epoch"])
        shown = default_predictor(parts.method, state["history"])
        matrix = confusion[parts.method.predictors.index(shown)]  # [K, K]
        report = {
            "checkpoint": str(path),
            "epoch": state["epoch"],
            **options,
            "images": int(matrix.sum()),
            "metrics": results,
            "classes": state["classes"],
            "class_accuracy": {
                predictor: class_accuracy(counts)
                for predictor, counts in zip(parts.method.predictors, confusion, strict=True)
            },
            "confusion": {"predictor": shown, "counts": matrix.tolist()},  # a row a true class
        }
        write_report(report, matrix, folder)
        parts.tracker.log({f"test/{name}": value for name, value in results.items()}, state["epoch"])
        for name in FILES:
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


def write_report(report: dict[str, Any], confusion: Tensor, folder: Path) -> None:
    """Write all numbers, and draw the confusion matrix [K, K] of the predictor that is shown.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        text = json.dumps(report, ensure_ascii=False) + "\n"
        (folder / "evaluation.json").write_text(text, encoding="utf-8")
        title = f"{report['dataset']}, {report['confusion']['predictor']}"
        draw_confusion(confusion, report["classes"], title, folder)
    except OSError as error:
        raise ConfigError(
            f"{folder}: evaluation.json, confusion.png and confusion.pdf cannot be written"
            f" ({error.strerror or error}). Make room, or name another folder: hydra.run.dir=PATH."
        ) from error
