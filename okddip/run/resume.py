"""Going on with a run that was cut off: which run it is, and whether it is the same run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from okddip.assembly import make
from okddip.data.dataset import Dataset
from okddip.errors import ConfigError, check_number
from okddip.files import copy, link, sync_folder, writing
from okddip.run.folder import (
    Run,
    complete_metrics,
    lock_folder,
    read_metadata,
    read_metrics,
    record_job,
    restarted_jobs,
    stored_identity,
    update_metadata,
    write_metrics,
)
from okddip.run.identity import dataset_digests, fingerprint, identifying_settings, run_identity
from okddip.run.references import find_checkpoint
from okddip.text import for_shell
from okddip.tracking.address import absolute_uri
from okddip.tracking.tracker import MLflow, NoTracking
from okddip.training import checkpoint
from okddip.training.checkpoint import KEYS, TRAINING_KEYS
from okddip.trust import trust_of

log = logging.getLogger(__name__)


@dataclass
class Found:
    """Where a run that goes on is: in its own folder, or (a copy, an artifact of MLflow) in no run's."""

    folder: Path | None = None
    checkpoint: Path | None = None
    tracking_id: str | None = None  # if the run was named by it


def former_lengths(
    run: Run, config: DictConfig, schedule: Callable[[int], float], ramp: Callable[[int], float]
) -> list[int]:
    """The lengths in epochs that a run was to have before it was made longer, if that makes it another.

    It does where learning rate or ramp follow from the length, as fractions of the run do and a cosine: then
    the finished epochs are not those of a run that was begun so long. Elsewhere they are.

    Args:
        run: that begins or goes on.
        config: of the command, with its length now.
        schedule, ramp: of a run of that length, by epoch.
    """
    from okddip.deployment.predictors import rebuild

    if run.state is None:
        return []
    before = list(run.state.get("lengths", []))
    length = int(run.state["config"]["trainer"]["epochs"])
    if length == config.trainer.epochs:
        return before
    _, method = rebuild(run.state, trust_of(config), run.folder)
    followed = make("scheduler", OmegaConf.create(run.state["config"]).scheduler, epochs=length)
    finished = range(run.state["epoch"] + 1)
    as_if_so_long = all((followed(e), method.ramp(e)) == (schedule(e), ramp(e)) for e in finished)
    return before if as_if_so_long else [*before, length]


@contextmanager
def open_run(config: DictConfig, folder: Path, *, patient: bool = False) -> Iterator[Run]:
    """Take up the run that `trainer.resume` names, or begin a new one in `folder`; and hold its folder.

    Args:
        config: of the run.
        folder: for a new one.
        patient: wait for the run if another process works on it, and then take up what has become of it.

    Raises:
        ConfigError: there is no such run, it was made with other settings, or it is still running.
    """
    check_number("trainer.epochs", config.trainer.epochs, minimum=1, integer=True)
    found = find_run(config, folder)
    with lock_folder(found.folder or folder, patient=patient):
        if found.folder is not None:
            yield reopen_run(config, found.folder, found.tracking_id)
        elif found.checkpoint is not None:
            yield adopt_checkpoint(config, folder, found.checkpoint, found.tracking_id)
        else:
            yield new_run(config, folder)


def find_run(config: DictConfig, folder: Path) -> Found:
    """Find what `trainer.resume` names.

    `auto` is the newest run with this very configuration and these images among the neighbours of `folder`,
    or else of the unfinished ones in the store that are on this machine, if there is one. Else a run is named
    by its folder, by its `last.pt`, or as `runs:/ID`; and a checkpoint that lies in no run's folder by its
    path. What Slurm requeued or torchrun restarted goes on, before all that, with the run it began itself.

    Raises:
        ConfigError: there is no such run.
    """
    reference = config.trainer.resume
    if reference is not None and not (isinstance(reference, str) and reference):
        raise ConfigError(f"trainer.resume={reference}: must be null, auto, a path or runs:/ID.")
    if restarted_jobs() and (begun := newest_run(config, folder, of_this_job=True)):
        return Found(begun)
    if reference is None:
        return Found()
    if reference == "auto":
        found = newest_run(config, folder) or newest_run_in_store(config)
        if found is None:
            log.info(
                "No run with this configuration in %s or in the store to go on with: a new one.",
                folder.parent,
            )
        return Found(found)
    if reference.startswith("runs:/"):
        run_id, _, name = reference.removeprefix("runs:/").partition("/")
        refuse_other_epoch(reference, name or "last.pt")
        own = folder_of_tracked_run(config, run_id)
        if own is not None:
            return Found(own, tracking_id=run_id)
        artifact = find_checkpoint("trainer.resume", reference, config.tracking.get("uri"))
        return Found(checkpoint=artifact, tracking_id=run_id)
    path = Path(reference).expanduser().absolute()
    if (path / "run.json").exists():
        return Found(path)
    path = find_checkpoint("trainer.resume", str(path), None)
    path = path.resolve() if path.is_symlink() else path
    if not (path.parent / "run.json").exists():
        return Found(checkpoint=path)
    refuse_other_epoch(reference, path.name)
    return Found(path.parent)


def new_run(config: DictConfig, folder: Path) -> Run:
    """A run that begins in `folder`, which it marks as its own.

    Raises:
        ConfigError: there is a run in it already.
    """
    if (folder / "last.pt").exists():
        raise ConfigError(
            f"{folder}: there is a run in this folder already. Name another folder in hydra.run.dir (for a"
            " sweep in hydra.sweep.dir), or go on with that run by trainer.resume=auto and its own settings."
        )
    run = Run(folder)
    with writing(folder):
        (folder / "metrics.jsonl").unlink(missing_ok=True)  # of a run that was cut off before a checkpoint
    record_job(run, config)
    return run


def reopen_run(config: DictConfig, folder: Path, tracking_id: str | None) -> Run:
    """The run in `folder`, with its last whole checkpoint if it got as far.

    Args:
        config: must be the run's; it may be longer.
        folder: of the run.
        tracking_id: of its MLflow run, if that is known.
    """
    facts = read_metadata(folder)
    run = Run(folder, None, tracking_id or facts.get("tracking_id"), facts.get("store"), taken_up=True)
    if any((folder / name).exists() for name in ("last.pt", "previous.pt")):
        run.state = checkpoint.load_last(folder)
        checkpoint.warn_of_other_version(run.state, folder)
        refuse_other_settings(config, run.state, folder)
    with writing(folder):
        for leftover in [*folder.glob("*.new"), *folder.glob("*.tmp")]:
            leftover.unlink()
    complete_metrics(run)
    record_job(run, config)
    return run


def adopt_checkpoint(config: DictConfig, folder: Path, path: Path, tracking_id: str | None) -> Run:
    """A run that goes on in `folder` from a checkpoint that lies in no run's folder.

    Args:
        config: must be the checkpoint's; it may be longer.
        folder: of the run.
        path: of the checkpoint; `best.pt` and `metrics.jsonl` beside it come along if they are of its run.
        tracking_id: of the MLflow run whose artifact it is.
    """

    def beside(name: str) -> Path:
        if tracking_id is None:
            return path.with_name(name)
        return find_checkpoint("trainer.resume", f"runs:/{tracking_id}/{name}", config.tracking.get("uri"))

    state = checkpoint.load(path, KEYS | TRAINING_KEYS)
    checkpoint.warn_of_other_version(state, path)
    refuse_other_settings(config, state, path)
    run = new_run(config, folder)
    run.state, run.tracking_id = state, tracking_id
    if tracking_id is not None:
        update_metadata(run, tracking_id=tracking_id)
    try:
        lines = read_metrics(beside("metrics.jsonl"))
    except ConfigError:
        lines = []
    if any(line[:2] == (state["epoch"], state["timestamp_ms"]) for line in lines):
        write_metrics(run, [line for line in lines if line[0] <= state["epoch"]])
    complete_metrics(run)
    with writing(folder):
        copy(path, folder / "last.new")
        best = state["history"].get("best", {}).get("epoch")
        if best == state["epoch"]:
            link(folder / "last.new", folder / "best.pt")
        elif best is not None:
            try:
                other = checkpoint.load(beside("best.pt"))
                if other["epoch"] != best or settings_without_length(other) != settings_without_length(state):
                    raise ConfigError(f"{beside('best.pt')}: is of another run.")
                copy(beside("best.pt"), folder / "best.pt")
            except ConfigError as error:
                log.warning("The checkpoint of the best epoch so far, %d, is not here: %s", best + 1, error)
        (folder / "last.new").replace(folder / "last.pt")
        sync_folder(folder)
    return run


def settings_without_length(state: dict[str, Any]) -> dict[str, str]:
    """The settings of a checkpoint apart from the length of its run, which may have grown."""
    return {
        key: value for key, value in identifying_settings(state["config"]).items() if key != "trainer.epochs"
    }


def newest_run(config: DictConfig, folder: Path, *, of_this_job: bool = False) -> Path | None:
    """The folder of the run last begun with this configuration (in this job), looking beside `folder`.

    Runs on other images are other runs, except in this job.
    """
    # outputs/NAME/TIME has neighbours outputs/NAME/*; a job's multirun/TIME/JOB has multirun/*/*
    notes = {*folder.glob("run.json"), *folder.parent.glob("*/run.json")}
    if (folder.parent / "multirun.yaml").exists():
        notes |= {*folder.parent.parent.glob("*/*/run.json")}
    wanted = run_identity(config)
    if of_this_job:  # what it was asked for may have become another run: one that was made longer
        notes = {
            path
            for path in notes
            if restarted_jobs() & set(read_metadata(path.parent).get("job", "").split())
        }
        same = [path for path in notes if read_metadata(path.parent).get("asked") == wanted]
        return max(same, key=lambda path: path.stat().st_mtime).parent if same else None
    same = [path for path in notes if stored_identity(path.parent) == wanted]
    if any("data" in read_metadata(path.parent) for path in same):
        ours = fingerprint(dataset_digests(config))
        same = [path for path in same if read_metadata(path.parent).get("data", ours) == ours]
    return max(same, key=lambda path: path.stat().st_mtime).parent if same else None


def newest_run_in_store(config: DictConfig, tags: Mapping[str, str] = MappingProxyType({})) -> Path | None:
    """The folder on this machine of the unfinished run that the store has for this configuration.

    Args:
        config: of the run.
        tags: that it must have too.

    Raises:
        ConfigError: the store cannot be opened.
    """
    tracker = instantiate(config.tracking)
    tracker.open()
    wanted = run_identity(config)
    for run in tracker.find({"identity": wanted, **tags}):
        folder = Path(run.data.tags.get("folder", ""))
        if run.info.status == "FINISHED" or not (folder / "run.json").exists():
            continue
        if stored_identity(folder) == wanted:
            known = read_metadata(folder).get("data")
            if known is None or known == fingerprint(dataset_digests(config)):
                return folder
    return None


def folder_of_tracked_run(config: DictConfig, run_id: str) -> Path | None:
    """The folder of an MLflow run, if it is on this machine.

    Raises:
        ConfigError: the store does not answer.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    tracker = instantiate(config.tracking)
    if not isinstance(tracker, MLflow):
        return None  # checkpoint.find says what is wrong
    tracker.open()
    try:
        tags = MlflowClient(absolute_uri(tracker.uri)).get_run(run_id).data.tags
    except MlflowException:
        return None  # again
    folder = Path(tags.get("folder", ""))
    return folder if (folder / "run.json").exists() else None


def find_tracked_run(run: Run, tracker: MLflow | NoTracking, reference: str | None) -> None:
    """Find the MLflow run of a run that goes on and does not know it.

    It was cut off before it could write the ID down, or `run.json` is damaged; or it went on in another store
    or another experiment in between.
    """
    if run.taken_up and (run.tracking_id is None or reference == "auto"):
        found = [
            known.info.run_id
            for known in tracker.find({"folder": str(run.folder)})
            if not {"kind", "task"}
            & known.data.tags.keys()  # an evaluation may have been told to write there
        ]
        if found and run.tracking_id not in found:
            run.tracking_id = found[0]


def refuse_other_epoch(reference: str, name: str) -> None:
    """Refuse to go on from another checkpoint of a run than its last.

    Raises:
        ConfigError: says what to give.
    """
    if name != "last.pt":
        run = reference.rpartition("/")[0] or "."
        raise ConfigError(
            f"trainer.resume={reference}: a run goes on from its last epoch, {name} is of another. Give"
            f" trainer.resume={run} to go on with the run. To train on from this epoch in a new one, copy the"
            " file to another folder and name the copy."
        )


def refuse_other_settings(config: DictConfig, state: dict[str, Any], place: Path) -> None:
    """Refuse to go on under other settings than the checkpoint's; a longer run is allowed.

    Raises:
        ConfigError: lists what differs.
    """
    theirs, ours = identifying_settings(state["config"]), identifying_settings(config)
    differences = [
        f"  {key}: {theirs.get(key, 'absent')} there, {ours.get(key, 'absent')} here"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
        and not (key == "trainer.epochs" and int(ours[key]) > int(theirs.get(key, ours[key])))
    ]
    if differences:
        raise ConfigError(
            f"trainer.resume={config.trainer.resume}: {place} was made with other settings, so going on would"
            " mix two runs:\n"
            + "\n".join(differences)
            + "\nGive the same settings (trainer.epochs may grow), or begin a new run without trainer.resume."
        )


def refuse_other_data(run: Run, dataset: Dataset, digests: Mapping[str, str]) -> None:
    """Refuse to go on with other images than those that the checkpoint has learned from.

    Args:
        run: which may have just begun.
        dataset: of the configuration.
        digests: of its splits.

    Raises:
        ConfigError: names what differs.
    """
    if run.state is None:
        return
    theirs = {"classes": run.state["classes"], **run.state.get("digests", digests)}
    ours = {"classes": list(dataset.classes), **digests}
    if different := [name for name in ours if theirs.get(name) != ours[name]]:
        root = run.state["config"]["dataset"].get("root")
        raise ConfigError(
            f"{run.folder}: this run was trained on other data ({', '.join(different)} differ; its"
            f" dataset.root is {root}, with classes {first_names(theirs['classes'])}; here they are"
            f" {first_names(ours['classes'])}), so going on would mix two runs. Name the data set that it was"
            " begun with, or begin a new run: leave trainer.resume out."
        )


def first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def resume_hint(reference: str = "auto") -> str:
    """What goes on with the run of this process.

    Args:
        reference: for `trainer.resume`.
    """
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("trainer.resume=")]
    return f"Go on with: {for_shell(['okddip', *arguments, f'trainer.resume={reference}'])}"
