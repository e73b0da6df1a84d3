"""The parent run of a sweep in MLflow, and the lock that shows that the sweep goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from okddip.errors import ConfigError
from okddip.signals import stops_deferred
from okddip.sweeps.environment import NAME, PARENT_RUN, START, UNNAMED
from okddip.sweeps.job import TRAIN
from okddip.sweeps.joblib import PATIENCE
from okddip.sweeps.outcomes import Outcome
from okddip.text import for_markdown
from okddip.tracking.outbox import LOCK

if TYPE_CHECKING:  # sweeps begin before anything heavy is imported
    from okddip.tracking.tracker import MLflow, NoTracking


@dataclass
class Sweep:
    """The sweep of this process."""

    name: str
    folder: Path
    outlived: bool = False  # by its jobs, if it is stopped
    tracker: MLflow | NoTracking | None = None  # None: jobs that are no training runs have no parent
    jobs: list[list[str]] = field(default_factory=list)  # overrides of each, where they are known beforehand
    left_out: list[Outcome] = field(default_factory=list)  # of jobs that cannot be
    forced: bool = False  # all jobs are trained, whatever was finished before
    held: FileLock | None = None  # as long as the sweep goes on


def open_parent(sweep: Sweep, config: DictConfig) -> None:
    """Open the parent run of a sweep, or that of the same sweep when it ran before.

    Args:
        sweep: just begun.
        config: of the sweep, with Hydra's own part; what is swept has its default here.

    Raises:
        ConfigError: the store cannot be opened.
    """
    if config.task._target_ != TRAIN:
        return
    # the same sweep, wherever it is started and whatever is told of it
    from okddip.run.identity import (
        FOLDER_DATASETS,
        IGNORED_DATASET_SETTINGS,
        IGNORED_SETTINGS,
        without_gpu_index,
    )

    overrides, swept = sweep_overrides(config)
    choices, method = config.hydra.runtime.choices, config.method
    groups = {group: swept.get(group, choices[group]) for group in ("method", "model", "dataset")}
    # (what several methods share is named by their own settings in a job, and here by itself)
    places = [place for place in IGNORED_SETTINGS if place != "methods."]
    places += [f"dataset.{key}" for key in IGNORED_DATASET_SETTINGS]
    settings = sorted(
        f"{key}={without_gpu_index(key, value)}"
        for key, value in overrides.items()
        if not key.startswith((*places, "tracking"))
    )
    if set(datasets(config)) & set(FOLDER_DATASETS):  # each folder is a data set of its own
        root = swept.get("dataset.root") or Path(str(config.dataset.root)).expanduser().absolute()
        settings.append(f"dataset.root={root}")
    if config.trainer.rerun:
        settings.append("trainer.rerun=true")
    identity = hashlib.sha256(json.dumps([sweep.name, *settings]).encode()).hexdigest()[:16]
    tracker = instantiate(config.tracking)
    tracker.open()
    parents = tracker.find({"kind": "sweep"})
    same = [parent for parent in parents if parent.data.tags.get("identity") == identity]
    sweep.forced = bool(config.trainer.rerun)
    if sweep.forced:  # one that came to its end is forced anew, one that was cut off goes on
        same = [parent for parent in same if parent.info.status in ("RUNNING", "KILLED")]
    own = "each method's own"
    with stops_deferred():  # a run that has begun must be known, to be ended
        sweep.tracker = tracker
        run_id = tracker.start(
            name=sweep.name,
            params={f"sweep.{key}": values for key, values in swept.items()},
            tags={
                "kind": "sweep",
                "sweep": sweep.name,
                "identity": identity,
                "folder": str(sweep.folder),
                LOCK: sweep.held.lock_file if sweep.held else "",
                **groups,
                "structure": swept.get("method.structure", own if "method" in swept else method.structure),
                "peers": swept.get("method.peers", own if "method" in swept else str(method.peers)),
                "seed": swept.get("seed", str(config.seed)),
                **(
                    {} if same else {"mlflow.note.content": sweep_description(swept)}
                ),  # which people may edit
            },
            config_yaml=OmegaConf.to_yaml(
                OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            ),
            command=shlex.join(["okddip", *sys.argv[1:]]),
            run_id=same[0].info.run_id if same else None,
        )
        os.environ[NAME], os.environ[PARENT_RUN] = sweep.name, run_id
        os.environ[UNNAMED] = " ".join(key for key in swept if key not in keys_in_name(config))


def lock_sweep(sweep: Sweep) -> None:
    """Hold the folder of a sweep, and show others that it goes on, until its process ends, however it ends.

    Raises:
        ConfigError: another sweep goes on in this folder; its jobs' folders may have the same names.
    """
    sweep.folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(sweep.folder / f"sweep-{os.environ[START][:8]}.lock")
    with suppress(OSError, NotImplementedError):  # a file system without locks
        with FileLock(sweep.folder / ".sweep.lock", timeout=PATIENCE):  # one sweep at a time looks, and holds
            if any(is_locked(lock) for lock in sweep.folder.glob("sweep-*.lock")):
                raise ConfigError(
                    f"hydra.sweep.dir={sweep.folder}: another sweep goes on in this folder, and each would"
                    " write over what the other's jobs leave. Name another folder, or leave hydra.sweep.dir"
                    " out: jobs that both have are trained once in any case. Or wait for the other's end."
                    " (If there is none, remove sweep-*.lock there.)"
                )
            held.acquire(timeout=0)
        sweep.held = held


def is_locked(lock: Path) -> bool:
    """Whether the process of a sweep lives that holds this file."""
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def unlock_sweep(sweep: Sweep) -> None:
    if sweep.held is not None:
        Path(sweep.held.lock_file).unlink(missing_ok=True)
        sweep.held.release()


def datasets(config: DictConfig) -> list[str]:
    """The options of the group `dataset` that a sweep takes."""
    chosen = [override for override in parsed_overrides(config) if override.key_or_group == "dataset"]
    if not (chosen and chosen[-1].is_discrete_sweep()):
        return [str(config.hydra.runtime.choices.dataset)]
    return [str(getattr(option, "text", option)) for option in chosen[-1].sweep_iterator()]


def keys_in_name(config: DictConfig) -> set[str]:
    """The keys and groups that the setting `name` refers to."""
    name = str(OmegaConf.to_container(config, resolve=False)["name"])  # type: ignore[call-overload, index]
    keys = set(re.findall(r"\$\{([^}]+)\}", name))
    return {key.removeprefix("options.").removeprefix("hydra:runtime.choices.") for key in keys}


def sweep_description(swept: Mapping[str, str]) -> str:
    """What a sweep varies, in Markdown."""
    items = [f"- **{for_markdown(key)}** {for_markdown(v.replace(',', ', '))}" for key, v in swept.items()]
    return "\n".join(["A sweep; its jobs are the child runs.", "", *items])


def sweep_overrides(config: DictConfig) -> tuple[dict[str, str], dict[str, str]]:
    """All overrides of a sweep, those that it is configured with among them; and what is swept."""
    overrides: dict[str, str] = {}
    swept: dict[str, str] = {}
    for override in parsed_overrides(config):
        key, _, value = (override.input_line or "").partition("=")
        key = key.lstrip("+")
        overrides[key] = value
        swept.pop(key, None)
        if override.is_sweep_override():
            swept[key] = value
    return overrides, swept


def parsed_overrides(config: DictConfig) -> list[Override]:
    """All overrides of a sweep, in the order of Hydra's sweepers: of several for one key the last counts."""
    given = OmegaConf.select(config, "hydra.sweeper.params") or {}
    lines = [f"{key}={value}" for key, value in given.items()] + list(config.hydra.overrides.task)
    return OverridesParser.create(config_loader=GlobalHydra.instance().config_loader()).parse_overrides(lines)
