"""The parent run of a sweep in MLflow: a new one, or that of the same sweep when it ran before."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from okddip import invocation
from okddip.assembly import PEERS, name_of_models
from okddip.run.identity import (
    FOLDER_DATASETS,
    IGNORED_DATASET_SETTINGS,
    IGNORED_SETTINGS,
    identifying_value,
)
from okddip.signals import stops_deferred
from okddip.sweeps.environment import SweepInfo, is_training
from okddip.text import for_markdown
from okddip.tracking.unsent import LOCK

if TYPE_CHECKING:  # sweeps begin before anything heavy is imported
    from okddip.sweeps.sweep import Sweep
    from okddip.tracking.tracker import MLflow, NoTracking

# What no sweep's identity depends on. What several methods share does count: each job names it by the setting
# of its own method, and the sweep by itself.
IGNORED_OVERRIDES = (
    *(place for place in IGNORED_SETTINGS if place != "methods."),
    *(f"dataset.{key}" for key in IGNORED_DATASET_SETTINGS),
    "tracking",
)
OPEN = ("RUNNING", "KILLED")  # statuses of a sweep that did not come to its end


def open_parent_run(sweep: Sweep, config: DictConfig) -> None:
    """Open the parent run of a sweep, and let its jobs know it. Jobs that train nothing have none.

    Args:
        sweep: just begun.
        config: of the sweep, with Hydra's own part; what is swept has its default here.

    Raises:
        ConfigError: the store cannot be opened.
    """
    if not is_training(config):
        return
    sweep.rerun = bool(config.trainer.rerun)
    tracker = instantiate(config.tracking)
    tracker.open()
    identity = sweep_identity(sweep.name, config)
    before = find_parent_run(tracker, identity, rerun=sweep.rerun)
    _, swept = sweep_overrides(config)
    tags = parent_tags(config, swept) | {
        "kind": "sweep",
        "sweep": sweep.name,
        "identity": identity,
        "folder": str(sweep.folder),
        LOCK: sweep.lock_file.lock_file if sweep.lock_file else "",
    }
    if before is None:
        tags["mlflow.note.content"] = sweep_description(swept)  # which people may edit afterwards
    with stops_deferred():  # a run that has begun must be known, to be ended
        sweep.tracker = tracker
        sweep.parent_run = tracker.start(
            name=sweep.name,
            params={f"sweep.{key}": values for key, values in swept.items()},
            tags=tags,
            config_yaml=OmegaConf.to_yaml(
                OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            ),
            command=invocation.command(),
            run_id=before,
        )
        unnamed = [key for key in swept if key not in keys_in_name(config)]
        info = SweepInfo.read()
        info.name, info.parent_run, info.unnamed = sweep.name, sweep.parent_run, unnamed
        info.publish()


def sweep_identity(name: str, config: DictConfig) -> str:
    """A short hash that is the same for the same sweep, wherever it is started and however it is logged.

    Args:
        name: of the sweep.
        config: of the sweep, with Hydra's own part.
    """
    overrides, swept = sweep_overrides(config)
    settings = sorted(
        f"{key}={identifying_value(key, value)}"
        for key, value in overrides.items()
        if not key.startswith(IGNORED_OVERRIDES)
    )
    dataset = swept.get("dataset", config.hydra.runtime.choices.dataset)
    if set(re.findall(r"\w+", dataset)) & set(FOLDER_DATASETS):  # each folder is a data set of its own
        root = swept.get("dataset.root") or Path(str(config.dataset.root)).expanduser().absolute()
        settings.append(f"dataset.root={root}")
    if config.trainer.rerun:
        settings.append("trainer.rerun=true")
    return hashlib.sha256(json.dumps([name, *settings]).encode()).hexdigest()[:16]


def find_parent_run(tracker: MLflow | NoTracking, identity: str, *, rerun: bool) -> str | None:
    """The ID of the newest parent run of the same sweep.

    Args:
        tracker: open.
        identity: of the sweep.
        rerun: all jobs are to be trained again: then a sweep that came to its end does not count.
    """
    parents = [run for run in tracker.find({"kind": "sweep"}) if run.data.tags.get("identity") == identity]
    ids = [run.info.run_id for run in parents if not rerun or run.info.status in OPEN]
    return ids[0] if ids else None


def parent_tags(config: DictConfig, swept: Mapping[str, str]) -> dict[str, str]:
    """The tags that a job's run has too; where they are swept, all values."""
    choices = config.hydra.runtime.choices

    def of_method(key: str) -> str:
        default = "each method's own" if "method" in swept else str(config.method[key])
        return swept.get(f"method.{key}", default)

    models = name_of_models(OmegaConf.select(config, f"model.{PEERS}"), choices["model"])
    return {
        **{group: swept.get(group, choices[group]) for group in ("method", "dataset")},
        "model": swept.get("model") or swept.get(f"model.{PEERS}") or models,
        "structure": of_method("structure"),
        "peers": of_method("peers"),
        "seed": swept.get("seed", str(config.seed)),
    }


def sweep_description(swept: Mapping[str, str]) -> str:
    """What a sweep varies, in Markdown."""
    items = [f"- **{for_markdown(key)}** {for_markdown(v.replace(',', ', '))}" for key, v in swept.items()]
    return "\n".join(["A sweep; its jobs are the child runs.", "", *items])


def sweep_overrides(config: DictConfig) -> tuple[dict[str, str], dict[str, str]]:
    """All overrides of a sweep, and those of them that are swept; of several for one key the last counts.

    Args:
        config: of the sweep, with Hydra's own part.
    """
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    lines = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    overrides: dict[str, str] = {}
    swept: dict[str, str] = {}
    for override in parser.parse_overrides(lines):
        key, _, value = (override.input_line or "").partition("=")
        key = key.lstrip("+")
        overrides[key] = value
        swept.pop(key, None)
        if override.is_sweep_override():
            swept[key] = value
    return overrides, swept


def keys_in_name(config: DictConfig) -> set[str]:
    """The keys and groups that the setting `name` refers to."""
    name = str(OmegaConf.to_container(config, resolve=False)["name"])  # type: ignore[call-overload, index]
    keys = set(re.findall(r"\$\{([^}]+)\}", name))
    keys = {key.removeprefix("options.").removeprefix("hydra:runtime.choices.") for key in keys}
    return keys | ({f"model.{PEERS}"} if "model" in keys else set())  # which is called by its peers then
