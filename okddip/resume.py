"""Going on with a run that was cut off: which run it is, and whether it is the same run."""

import hashlib
import json
import logging
import os
import shlex
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from filelock import AcquireReturnProxy, FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from okddip import checkpoint
from okddip.errors import ConfigError
from okddip.tracking import absolute, flatten

log = logging.getLogger(__name__)

# What may differ between two runs that are the same run: where things are and how they are logged; and what
# several methods share, which counts where a method takes it.
PLACES = ("name", "tracking.", "trainer.resume", "trainer.rerun", "task.", "methods.")
PLACES_OF_DATA = ("root", "cache_dir")


@dataclass
class Run:
    """A run on disk."""

    folder: Path
    lock: AbstractContextManager[Any]  # held as long as a process works on the run
    state: dict[str, Any] | None = None  # its last checkpoint, if it goes on from one
    tracking_id: str | None = None  # of the MLflow run it goes on with


def settings(config: DictConfig) -> dict[str, str]:
    """What makes a run what it is: the flattened configuration without places and switches."""
    flat = flatten(cast(dict[str, Any], OmegaConf.to_container(config, resolve=True)))
    return {
        key: value
        for key, value in flat.items()
        if not key.startswith(PLACES)
        and not (key.startswith("dataset.") and key.rpartition(".")[2] in PLACES_OF_DATA)
    }


def identity(config: DictConfig) -> str:
    """A short hash of `settings`: runs that are the same have the same."""
    return hashlib.sha256(json.dumps(settings(config), sort_keys=True).encode()).hexdigest()[:16]


def begin(config: DictConfig, folder: Path) -> Run:
    """Find the run that `trainer.resume` names, or begin a new one in `folder`.

    `auto` finds the newest run with this very configuration among the neighbours of `folder`, and begins a
    new one if there is none. What Slurm requeued or torchrun restarted resumes as with `auto`.

    Raises:
        ConfigError: there is no such run, it was made with other settings, or it is still running.
    """
    reference = config.trainer.resume
    restarts = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    if reference is None and any(count != "0" for count in restarts):
        reference = "auto"
    if reference is None:
        return new(config, folder)
    if reference == "auto":
        found = newest(config, folder)
        if found is None:
            log.info("No run with this configuration in %s to go on with: a new one.", folder.parent)
            return new(config, folder)
        return take_up(found)
    own = folder_of(reference, config.tracking.get("uri")) if reference.startswith("runs:/") else None
    if own is not None and not (own / "last.pt").exists():
        return take_up(own)
    path = checkpoint.find("trainer.resume", str(own or reference), config.tracking.get("uri"))
    refuse_other_settings(config, checkpoint.load_or_previous(path), reference)
    if (path.parent / "run.json").exists():
        return take_up(path.parent)
    # downloaded from MLflow: the run's own folder is on another machine
    run = new(config, folder)
    run.state = checkpoint.load(path)
    if reference.startswith("runs:/"):
        run.tracking_id = reference.removeprefix("runs:/").partition("/")[0]
    return run


def new(config: DictConfig, folder: Path) -> Run:
    """A run that begins in `folder`, which it marks as its own."""
    run = Run(folder, lock(folder))
    note(run, identity=identity(config))
    return run


def take_up(folder: Path) -> Run:
    """The run in `folder`, with its last whole checkpoint if it got as far."""
    run = Run(folder, lock(folder))
    run.tracking_id = json.loads((folder / "run.json").read_text()).get("tracking_id") or None
    if (folder / "last.pt").exists():
        run.state = checkpoint.load_or_previous(folder / "last.pt")
    forget_unfinished(run)
    return run


def note(run: Run, **facts: str) -> None:
    """Write down facts about a run in its `run.json`."""
    path = run.folder / "run.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    checkpoint.write_text(path, json.dumps(known | facts, indent=1) + "\n")


def newest(config: DictConfig, folder: Path) -> Path | None:
    """The folder of the run last begun with this configuration, looking beside `folder`."""
    # outputs/NAME/TIME has neighbours outputs/NAME/*; a job's multirun/TIME/JOB has multirun/*/*
    notes = {*folder.glob("run.json"), *folder.parent.glob("*/run.json")}
    if (folder.parent / "multirun.yaml").exists():
        notes |= {*folder.parent.parent.glob("*/*/run.json")}
    wanted = identity(config)
    same = [path for path in notes if json.loads(path.read_text()).get("identity") == wanted]
    return max(same, key=lambda path: path.stat().st_mtime).parent if same else None


def lock(folder: Path) -> AcquireReturnProxy:
    """Hold a folder until the process ends, however it ends.

    Raises:
        ConfigError: another process holds it.
    """
    try:
        return FileLock(folder / "run.lock").acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{folder}: this run is still running in another process.") from None


def folder_of(reference: str, tracking_uri: str | None) -> Path | None:
    """The folder of an MLflow run (`runs:/ID`), if it is on this machine."""
    if tracking_uri is None:
        return None
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        tags = (
            MlflowClient(absolute(tracking_uri))
            .get_run(reference.removeprefix("runs:/").partition("/")[0])
            .data.tags
        )
    except MlflowException:
        return None  # checkpoint.find says what is wrong
    folder = Path(tags.get("folder", ""))
    return folder if (folder / "run.json").exists() else None


def refuse_other_settings(config: DictConfig, state: dict[str, Any], reference: str) -> None:
    """Refuse to go on under other settings than the checkpoint's; a longer run is allowed.

    Raises:
        ConfigError: lists what differs.
    """
    theirs, ours = settings(OmegaConf.create(state["config"])), settings(config)
    differences = [
        f"  {key}: {theirs.get(key, 'absent')} there, {ours.get(key, 'absent')} here"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
        and not (key == "trainer.epochs" and int(ours[key]) > int(theirs[key]))
    ]
    if differences:
        raise ConfigError(
            f"trainer.resume={reference}: was made with other settings, so going on would mix two runs:\n"
            + "\n".join(differences)
            + "\nGive the same settings (trainer.epochs may grow), or begin a new run without trainer.resume."
        )


def finished_epochs(folder: Path) -> list[tuple[int, int, dict[str, float]]]:
    """Epoch, time (milliseconds since 1970) and metrics of each line of a run's `metrics.jsonl`."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    finished = []
    for line in lines:
        try:
            results = json.loads(line)
        except json.JSONDecodeError:  # cut off while it was written
            break
        finished.append((results.pop("epoch"), results.pop("timestamp_ms"), results))
    return finished


def forget_unfinished(run: Run) -> None:
    """Drop the metrics of an epoch that was cut off before its checkpoint: it is trained again."""
    last = run.state["epoch"] if run.state else -1
    lines = [
        json.dumps({"epoch": epoch, "timestamp_ms": timestamp_ms, **results}) + "\n"
        for epoch, timestamp_ms, results in finished_epochs(run.folder)
        if epoch <= last
    ]
    checkpoint.write_text(run.folder / "metrics.jsonl", "".join(lines))


def command() -> str:
    """The command that goes on with the run of this process."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("trainer.resume=")]
    return shlex.join(["okddip", *arguments, "trainer.resume=auto"])
