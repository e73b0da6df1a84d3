"""What is done with model, method, optimizer and data set."""

import logging
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer

import okddip
from okddip import tracking
from okddip.data.dataset import Dataset
from okddip.methods.base import Method
from okddip.models.group import PeerGroup
from okddip.schedules import Schedule
from okddip.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass
class Parts:
    """What a configuration was instantiated into."""

    trainer: Trainer
    tracker: tracking.MLflow | tracking.NoTracking
    dataset: Dataset
    group: PeerGroup
    method: Method
    optimizer: Optimizer
    schedule: Schedule
    folder: Path  # of the run


def train(config: DictConfig, build: Callable[[DictConfig], Parts]) -> float:
    """Train a group of peers, evaluate, checkpoint and log it.

    Args:
        config: resolved.
        build: instantiates the parts of a configuration.

    Returns:
        Top-1 of the primary predictor after the last epoch, in percent.
    """
    parts = build(config)
    settings = cast(dict[str, Any], OmegaConf.to_container(config))
    describe(config, parts)
    parts.tracker.start(
        name=config.name,
        params=settings,
        tags={
            **{name: str(option) for name, option in config.options.items()},
            "peers": str(parts.method.peers),
            "structure": parts.method.structure,
            "seed": str(config.seed),
            "device": str(parts.trainer.device),
        },
        config_yaml=OmegaConf.to_yaml(config),
        command=shlex.join(["okddip", *sys.argv[1:]]),
    )
    try:
        history = parts.trainer.fit(
            group=parts.group,
            method=parts.method,
            optimizer=parts.optimizer,
            schedule=parts.schedule,
            dataset=parts.dataset,
            tracker=parts.tracker,
            folder=parts.folder,
            seed=config.seed,
            description={
                "version": okddip.__version__,
                "config": settings,
                "classes": list(parts.dataset.classes),
                "channels": parts.dataset.channels,
            },
        )
    except BaseException as error:
        parts.tracker.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    last, best = history["last"], history["best"]
    summary = {"final/top1": last["test/top1"], "best/top1": best["test/top1"], "best/epoch": best["epoch"]}
    parts.tracker.log(summary, int(last["epoch"]))
    if config.tracking.get("checkpoints"):
        for name in ("last.pt", "best.pt"):
            parts.tracker.log_artifact(parts.folder / name)
    parts.tracker.finish("FINISHED")
    log_table(history, parts.method)
    return last["test/top1"]


def describe(config: DictConfig, parts: Parts) -> None:
    """Say what the run is, before it begins."""
    method, group, dataset, trainer = parts.method, parts.group, parts.dataset, parts.trainer
    plain = sum(parameter.numel() for parameter in group.extract(0).parameters())
    trained = sum(parameter.numel() for module in (group, method) for parameter in module.parameters())
    peers = f"{method.peers} peers ({method.structure})" if method.peers > 1 else "1 student"
    sizes = ", ".join(f"{size:,} {split}" for split, size in dataset.sizes.items())
    height, width = dataset.image_size
    compiled = f", compiled ({trainer.compile_mode})" if trainer.compile else ""
    log.info(
        "method     %s, %s\n"
        "model      %s, %s parameters; trained together %s\n"
        "data set   %s, %s images of %dx%dx%d, %d classes\n"
        "device     %s, %s%s\n"
        "folder     %s",
        *(config.options.method, peers),
        *(config.options.model, f"{plain:,}", f"{trained:,}"),
        *(config.options.dataset, sizes, dataset.channels, height, width, len(dataset.classes)),
        *(trainer.device, trainer.precision, compiled),
        parts.folder,
    )


def log_table(history: dict[str, dict[str, float]], method: Method) -> None:
    """Print every predictor's test top-1 at the last epoch and at the best."""
    last, best = history["last"], history["best"]
    predictors = [*method.predictors, *(["mean"] if method.peers > 1 else [])]
    rows = [f"{'test top-1 (%)':<16}{'last epoch':>12}{'best epoch':>12}"]
    rows.append(f"{'':<16}{last['epoch'] + 1:>12.0f}{best['epoch'] + 1:>12.0f}")
    for predictor in predictors:
        key = f"test/{predictor}/top1"
        mark = " *" if predictor == method.primary else ""
        rows.append(f"{predictor + mark:<16}{last[key]:>12.2f}{best[key]:>12.2f}")
    log.info("%s\n* primary", "\n".join(rows))
