"""What is logged of a run before it begins: its params, its description, its data sets."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from okddip import distributed
from okddip.assembly import NETWORKS, PEERS
from okddip.data.dataset import Dataset
from okddip.models.group import PeerGroup
from okddip.run.folder import Run
from okddip.run.identity import identifying_settings
from okddip.run.parts import Parts
from okddip.text import for_markdown, for_terminal
from okddip.tracking import tracker as tracking
from okddip.tracking.params import as_param, flatten

THREADS = "trainer.threads"

log = logging.getLogger(__name__)

PARAMETERS = "parameters.peers"  # the tag


def run_params(config: DictConfig | dict[str, Any]) -> dict[str, str]:
    """What MLflow's columns and plots show of a configuration: all that tells runs apart, and no more.

    Named like overrides, `method=okddip method.peers=4`. Left out are places, how a run is logged and
    continued, and import paths that follow from the name of an option; `config.yaml` has them all. The number
    of threads is told, although it makes no other run; and that of ranks, where each normalises its own share
    of a batch.
    """
    ranks = 1 if config["trainer"]["sync_batch_norm"] else distributed.world_size()
    flat = identifying_settings(config)
    named = {key: value for key, value in flat.items() if not key.startswith("options.")}
    return {
        **{name: str(option) for name, option in config["options"].items()},
        **{key: value for key, value in named.items() if not is_implied(key, value)},
        **flatten({"dataset.root": config["dataset"].get("root")}),
        **(
            {}
            if config["trainer"].get("threads") is None
            else flatten({THREADS: config["trainer"]["threads"]})
        ),
        **({"ranks": str(ranks)} if ranks > 1 else {}),
    }


def is_implied(key: str, value: str) -> bool:
    group, _, name = key.rpartition(".")
    if key == f"model.{NETWORKS}":  # of the options that `model.peers` names
        return True
    if name == "_target_" and value.startswith("okddip."):
        return group not in ("optimizer", "scheduler")  # whose option has no param of its own
    return name == "_partial_"


def tracked_splits(
    config: DictConfig, dataset: Dataset, digests: Mapping[str, str]
) -> dict[str, tracking.DatasetSplit]:
    """The splits of a data set for MLflow's own field."""
    root = config.dataset.get("source", config.dataset).get("root")
    place = dataset.name if root is None else str(Path(root).expanduser().absolute())
    return {
        split: tracking.DatasetSplit(dataset.name, digests[split], place, size)
        for split, size in dataset.sizes.items()
    }


def peers_tags(config: DictConfig, group: PeerGroup) -> dict[str, str]:
    """Where peers differ, the tag that says how many parameters each has: its model's, `[77754,272186]`."""
    models = config.model.get(PEERS) or []
    counts = [count_parameters(group.extract(index)) for index in range(len(models))]
    return {PARAMETERS: as_param(counts)} if counts else {}


def run_note(config: DictConfig, parts: Parts) -> dict[str, str]:
    """The tag that MLflow shows as the run's description, in Markdown."""
    items = [f"- **{what}** {for_markdown(text)}" for what, text in run_summary(config, parts).items()]
    hint = "`okddip task=report report.run=ID` with this run's ID prints the command that reproduces it."
    return {"mlflow.note.content": "\n".join([*items, "", hint])}


def run_summary(config: DictConfig, parts: Parts) -> dict[str, str]:
    """What the run is."""
    method, group, dataset, trainer = parts.method, parts.group, parts.dataset, parts.trainer
    models = config.model.get(PEERS) or [config.options.model]
    kinds = {model: count_parameters(group.extract(index)) for index, model in enumerate(models)}
    networks = " + ".join(f"{model}, {count:,} parameters" for model, count in kinds.items())
    trained = count_parameters(group) + count_parameters(method)
    peers = f"{method.peers} peers ({method.structure})" if method.peers > 1 else "1 student"
    sizes = ", ".join(f"{size:,} {split}" for split, size in dataset.sizes.items())
    height, width = dataset.image_size
    ranks = f" and {distributed.world_size() - 1} more" if distributed.world_size() > 1 else ""
    compiled = f", compiled ({trainer.compile_mode})" if trainer.compile else ""
    threads = "" if trainer.threads is None else f", {trainer.threads} thread{'s'[: trainer.threads > 1]}"
    images = f"images of {dataset.channels}x{height}x{width}"
    return {
        "method": f"{config.options.method}, {peers}",
        "model": f"{networks}; trained together {trained:,}",
        "data set": f"{config.options.dataset}, {sizes} {images}, {len(dataset.classes)} classes",
        "device": f"{trainer.device}{ranks}, {trainer.precision}{compiled}{threads}",
    }


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def log_run_summary(config: DictConfig, parts: Parts, run: Run) -> None:
    """Log what the run is, before it begins."""
    words = run_summary(config, parts)
    words["folder"] = f"{run.folder.path}" + (f"; {progress_of(config, run.state)}" if run.state else "")
    log.info("\n".join(f"{what:<10} {for_terminal(text)}" for what, text in words.items()))


def progress_of(config: DictConfig, state: dict[str, Any]) -> str:
    """How far a run is that resumes from a checkpoint."""
    done = state["epoch"] + 1
    if done == config.trainer.epochs:
        return f"is finished after epoch {done}, so nothing is trained"
    return f"resumes after epoch {done}"
