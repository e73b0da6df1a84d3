"""Going on with a run that was cut off: which run it is, and whether it is the same run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from filelock import FileLock, Timeout
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from okddip import distributed
from okddip.assembly import make, trust_of
from okddip.data.dataset import Dataset
from okddip.errors import ConfigError, check_number
from okddip.sweeps import sweep
from okddip.text import for_shell
from okddip.tracking.outbox import RUN_LOCK
from okddip.tracking.tracker import MLflow, NoTracking, absolute, flatten
from okddip.training import checkpoint
from okddip.training.checkpoint import KEYS, TRAINING_KEYS

log = logging.getLogger(__name__)

# What may differ between two runs that are the same run: where things are and how they are logged; and what
# several methods share, which counts where a method takes it.
PLACES = ("name", "tracking.", "trainer.resume", "trainer.rerun", "task.", "methods.", "trust")
PLACES_OF_DATA = ("root", "cache_dir")
FOLDERS = ("image_folder", "imagenet")  # data sets that are whatever lies in their place

SLURM = "slurm-"  # a job of Slurm's among `jobs`


@dataclass
class Run:
    """A run on disk."""

    folder: Path
    state: dict[str, Any] | None = None  # its last checkpoint, if it goes on from one
    tracking_id: str | None = None  # of the MLflow run it goes on with
    store: str | None = None  # where that one was begun
    taken_up: bool = False  # in its own folder


@dataclass
class Found:
    """Where a run that goes on is: in its own folder, or (a copy, an artifact of MLflow) in no run's."""

    folder: Path | None = None
    checkpoint: Path | None = None
    tracking_id: str | None = None  # if the run was named by it


def settings(config: DictConfig | dict[str, Any]) -> dict[str, str]:
    """What makes a run what it is: the flattened configuration without places and switches."""
    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    flat = flatten(cast(dict[str, Any], plain))
    return {
        key: alike(key, value)
        for key, value in flat.items()
        if not key.startswith(PLACES)
        and not (key.startswith("dataset.") and key.rpartition(".")[2] in PLACES_OF_DATA)
    }


def alike(key: str, value: str) -> str:
    """A setting's value without what makes no difference: which of a machine's GPUs it is."""
    return value.partition(":")[0] if key == "trainer.device" else value


def identity(config: DictConfig | dict[str, Any], lengths: Sequence[int] = ()) -> str:
    """A short hash of `settings`: runs that are the same have the same.

    Args:
        config: of the run.
        lengths: that it had before, see `lengths_before`.
    """
    known: dict[str, Any] = settings(config)
    if lengths:
        known["lengths"] = list(lengths)
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def lengths_before(
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
    from okddip.main import restore

    if run.state is None:
        return []
    before = list(run.state.get("lengths", []))
    length = int(run.state["config"]["trainer"]["epochs"])
    if length == config.trainer.epochs:
        return before
    _, method = restore(run.state, trust_of(config), run.folder)
    followed = make("scheduler", OmegaConf.create(run.state["config"]).scheduler, epochs=length)
    finished = range(run.state["epoch"] + 1)
    as_if_so_long = all((followed(e), method.ramp(e)) == (schedule(e), ramp(e)) for e in finished)
    return before if as_if_so_long else [*before, length]


def digests(config: DictConfig) -> dict[str, str]:
    """Of the images that a configuration names, split by split; in a sweep they are read once.

    Raises:
        ConfigError: the data set cannot be had.
    """
    dataset, start = OmegaConf.to_yaml(config.dataset, resolve=True), os.environ.get(sweep.START)
    return _digests(dataset, start) if start else _digests.__wrapped__(dataset, "")


@cache
def _digests(dataset: str, start_of_sweep: str) -> dict[str, str]:
    made = make("dataset", DictConfig(OmegaConf.create(dataset)))
    return {split: made.digest(split) for split in made.sizes}


def fingerprint(digests: Mapping[str, str]) -> str:
    """One word for the images of all splits."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def begin(config: DictConfig, folder: Path, *, patient: bool = False) -> Iterator[Run]:
    """Take up the run that `trainer.resume` names, or begin a new one in `folder`; and hold its folder.

    Args:
        config: of the run.
        folder: for a new one.
        patient: wait for the run if another process works on it, and then take up what has become of it.

    Raises:
        ConfigError: there is no such run, it was made with other settings, or it is still running.
    """
    check_number("trainer.epochs", config.trainer.epochs, minimum=1, integer=True)
    found = find(config, folder)
    with lock(found.folder or folder, patient=patient):
        if found.folder is not None:
            yield take_up(config, found.folder, found.tracking_id)
        elif found.checkpoint is not None:
            yield adopt(config, folder, found.checkpoint, found.tracking_id)
        else:
            yield new(config, folder)


def find(config: DictConfig, folder: Path) -> Found:
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
    if own_jobs() and (begun := newest(config, folder, of_this_job=True)):
        return Found(begun)
    if reference is None:
        return Found()
    if reference == "auto":
        found = newest(config, folder) or newest_in_store(config)
        if found is None:
            log.info(
                "No run with this configuration in %s or in the store to go on with: a new one.",
                folder.parent,
            )
        return Found(found)
    if reference.startswith("runs:/"):
        run_id, _, name = reference.removeprefix("runs:/").partition("/")
        refuse_other_epoch(reference, name or "last.pt")
        own = folder_of(config, run_id)
        if own is not None:
            return Found(own, tracking_id=run_id)
        artifact = checkpoint.find("trainer.resume", reference, config.tracking.get("uri"))
        return Found(checkpoint=artifact, tracking_id=run_id)
    path = Path(reference).expanduser().absolute()
    if (path / "run.json").exists():
        return Found(path)
    path = checkpoint.find("trainer.resume", str(path), None)
    path = path.resolve() if path.is_symlink() else path
    if not (path.parent / "run.json").exists():
        return Found(checkpoint=path)
    refuse_other_epoch(reference, path.name)
    return Found(path.parent)


def new(config: DictConfig, folder: Path) -> Run:
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
    with checkpoint.writing(folder):
        (folder / "metrics.jsonl").unlink(missing_ok=True)  # of a run that was cut off before a checkpoint
    sign(run, config)
    return run


def take_up(config: DictConfig, folder: Path, tracking_id: str | None) -> Run:
    """The run in `folder`, with its last whole checkpoint if it got as far.

    Args:
        config: must be the run's; it may be longer.
        folder: of the run.
        tracking_id: of its MLflow run, if that is known.
    """
    facts = noted(folder)
    run = Run(folder, None, tracking_id or facts.get("tracking_id"), facts.get("store"), taken_up=True)
    if any((folder / name).exists() for name in ("last.pt", "previous.pt")):
        run.state = checkpoint.load_last(folder)
        checkpoint.warn_of_other_version(run.state, folder)
        refuse_other_settings(config, run.state, folder)
    with checkpoint.writing(folder):
        for leftover in [*folder.glob("*.new"), *folder.glob("*.tmp")]:
            leftover.unlink()
    complete_metrics(run)
    sign(run, config)
    return run


def adopt(config: DictConfig, folder: Path, path: Path, tracking_id: str | None) -> Run:
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
        return checkpoint.find("trainer.resume", f"runs:/{tracking_id}/{name}", config.tracking.get("uri"))

    state = checkpoint.load(path, KEYS | TRAINING_KEYS)
    checkpoint.warn_of_other_version(state, path)
    refuse_other_settings(config, state, path)
    run = new(config, folder)
    run.state, run.tracking_id = state, tracking_id
    if tracking_id is not None:
        note(run, tracking_id=tracking_id)
    try:
        lines = finished_epochs(beside("metrics.jsonl"))
    except ConfigError:
        lines = []
    if any(line[:2] == (state["epoch"], state["timestamp_ms"]) for line in lines):
        write_metrics(run, [line for line in lines if line[0] <= state["epoch"]])
    complete_metrics(run)
    with checkpoint.writing(folder):
        checkpoint.copy(path, folder / "last.new")
        best = state["history"].get("best", {}).get("epoch")
        if best == state["epoch"]:
            checkpoint.link(folder / "last.new", folder / "best.pt")
        elif best is not None:
            try:
                other = checkpoint.load(beside("best.pt"))
                if other["epoch"] != best or beside_length(other) != beside_length(state):
                    raise ConfigError(f"{beside('best.pt')}: is of another run.")
                checkpoint.copy(beside("best.pt"), folder / "best.pt")
            except ConfigError as error:
                log.warning("The checkpoint of the best epoch so far, %d, is not here: %s", best + 1, error)
        (folder / "last.new").replace(folder / "last.pt")
        checkpoint.sync_folder(folder)
    return run


def beside_length(state: dict[str, Any]) -> dict[str, str]:
    """The settings of a checkpoint apart from the length of its run, which may have grown."""
    return {key: value for key, value in settings(state["config"]).items() if key != "trainer.epochs"}


def sign(run: Run, config: DictConfig) -> None:
    """Write down which jobs began a run or went on with it, and what they were asked for.

    And what a new run is; one that goes on may still be refused, for other images say.
    """
    asked = identity(config)
    new = {} if run.state else {"identity": asked}
    note(run, asked=asked, job=" ".join(sorted(jobs())), **new)


def note(run: Run, **facts: str) -> None:
    """Write down facts about a run in its `run.json`."""
    known = noted(run.folder)
    checkpoint.write_text(run.folder / "run.json", json.dumps(known | facts, indent=1) + "\n")


def noted(folder: Path) -> dict[str, str]:
    """What a run's `run.json` says; nothing if it is damaged."""
    path = folder / "run.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("no JSON object")
        return {key: value for key, value in facts.items() if isinstance(value, str)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s: cannot be read (%s), and counts as empty.", path, error)
        return {}


def jobs() -> set[str]:
    """What stays the same when Slurm requeues or torchrun restarts this process; empty for neither."""
    slurm = os.environ.get("SLURM_JOB_ID")
    return {*distributed.agents(), *([f"{SLURM}{slurm}"] if slurm else [])}


def own_jobs() -> set[str]:
    """Those of `jobs` whose runs this process has begun, if there are any.

    Of several machines, torchrun counts restarts on that alone where a process was killed; so where there are
    ranks, its count is not asked.
    """
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    restarted = distributed.ranks() > 1 or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return {job for job in jobs() if (requeued if job.startswith(SLURM) else restarted)}


def newest(config: DictConfig, folder: Path, *, of_this_job: bool = False) -> Path | None:
    """The folder of the run last begun with this configuration (in this job), looking beside `folder`.

    Runs on other images are other runs, except in this job.
    """
    # outputs/NAME/TIME has neighbours outputs/NAME/*; a job's multirun/TIME/JOB has multirun/*/*
    notes = {*folder.glob("run.json"), *folder.parent.glob("*/run.json")}
    if (folder.parent / "multirun.yaml").exists():
        notes |= {*folder.parent.parent.glob("*/*/run.json")}
    wanted = identity(config)
    if of_this_job:  # what it was asked for may have become another run: one that was made longer
        notes = {path for path in notes if own_jobs() & set(noted(path.parent).get("job", "").split())}
        same = [path for path in notes if noted(path.parent).get("asked") == wanted]
        return max(same, key=lambda path: path.stat().st_mtime).parent if same else None
    same = [path for path in notes if identity_of(path.parent) == wanted]
    if any("data" in noted(path.parent) for path in same):
        ours = fingerprint(digests(config))
        same = [path for path in same if noted(path.parent).get("data", ours) == ours]
    return max(same, key=lambda path: path.stat().st_mtime).parent if same else None


def newest_in_store(config: DictConfig, tags: Mapping[str, str] = MappingProxyType({})) -> Path | None:
    """The folder on this machine of the unfinished run that the store has for this configuration.

    Args:
        config: of the run.
        tags: that it must have too.

    Raises:
        ConfigError: the store cannot be opened.
    """
    tracker = instantiate(config.tracking)
    tracker.open()
    wanted = identity(config)
    for run in tracker.find({"identity": wanted, **tags}):
        folder = Path(run.data.tags.get("folder", ""))
        if run.info.status == "FINISHED" or not (folder / "run.json").exists():
            continue
        if identity_of(folder) == wanted:
            known = noted(folder).get("data")
            if known is None or known == fingerprint(digests(config)):
                return folder
    return None


def identity_of(folder: Path) -> str | None:
    """The identity of the run in a folder; where `run.json` is damaged, that of its checkpoint."""
    if known := noted(folder).get("identity"):
        return known
    try:
        state = checkpoint.load(folder / "last.pt")
        return identity(state["config"], state.get("lengths", []))
    except ConfigError:
        return None


def lock(folder: Path, *, patient: bool = False) -> AbstractContextManager[object]:
    """Hold a folder, until the process ends at the latest, however it ends.

    Raises:
        ConfigError: another process holds it, and this one is not to wait; or it cannot be written.
    """
    held = FileLock(folder / RUN_LOCK)
    try:
        return held.acquire(timeout=0)
    except Timeout:
        if patient:
            log.info("%s: another process works on this very run; waiting for it.", folder)
            return held.acquire()
        raise ConfigError(
            f"{folder}: this run is still running in another process. (If it is not, remove run.lock there.)"
        ) from None
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}).") from error


def folder_of(config: DictConfig, run_id: str) -> Path | None:
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
        tags = MlflowClient(absolute(tracker.uri)).get_run(run_id).data.tags
    except MlflowException:
        return None  # again
    folder = Path(tags.get("folder", ""))
    return folder if (folder / "run.json").exists() else None


def find_tracked(run: Run, tracker: MLflow | NoTracking, reference: str | None) -> None:
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
    theirs, ours = settings(state["config"]), settings(config)
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
            f" dataset.root is {root}, with classes {shortened(theirs['classes'])}; here they are"
            f" {shortened(ours['classes'])}), so going on would mix two runs. Name the data set that it was"
            " begun with, or begin a new run: leave trainer.resume out."
        )


def shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def finished_epochs(path: Path) -> list[tuple[int, int, dict[str, float]]]:
    """Epoch, time (milliseconds since 1970) and metrics of each line of a `metrics.jsonl`."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    finished = []
    for line in lines:
        try:
            results = json.loads(line)
            finished.append((results.pop("epoch"), results.pop("timestamp_ms"), results))
        except (ValueError, KeyError, AttributeError):  # cut off while it was written
            continue
    return finished


def time_of_summary(path: Path) -> int:
    """When a run that is finished came to its result, in milliseconds since 1970, by its `metrics.jsonl`.

    That is when its last epoch ended; in a file of an older version, whose times follow the clock back,
    later than all others. Of two results MLflow shows the later, so that of a longer run must be later; and
    as the time is the same whenever it is asked for, a result that is told of again is not doubled.
    """
    *before, last = (timestamp_ms for _, timestamp_ms, _ in finished_epochs(path))
    return max([last, *(timestamp_ms + 1 for timestamp_ms in before)])


def write_metrics(run: Run, finished: list[tuple[int, int, dict[str, float]]]) -> None:
    """Replace a run's `metrics.jsonl`."""
    lines = [
        json.dumps({"epoch": epoch, "timestamp_ms": timestamp_ms, **results}) + "\n"
        for epoch, timestamp_ms, results in finished
    ]
    checkpoint.write_text(run.folder / "metrics.jsonl", "".join(lines))


def complete_metrics(run: Run) -> None:
    """See that each epoch up to the checkpoint has one whole line.

    A run may be cut off between checkpoint and line. Lines of later epochs stay: their checkpoint was
    damaged, they were told of, and will be trained again.
    """
    finished = finished_epochs(run.folder / "metrics.jsonl")
    state = run.state
    if state is not None and state["epoch"] not in (epoch for epoch, _, _ in finished):
        finished.append((state["epoch"], state["timestamp_ms"], state["metrics"]))
    write_metrics(run, sorted(finished, key=lambda line: line[0]))


def how_to_go_on(reference: str = "auto") -> str:
    """What goes on with the run of this process.

    Args:
        reference: for `trainer.resume`.
    """
    if sweep.is_job():
        return "The command of its sweep, given again, goes on with it."
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("trainer.resume=")]
    return f"Go on with: {for_shell(['okddip', *arguments, f'trainer.resume={reference}'])}"
