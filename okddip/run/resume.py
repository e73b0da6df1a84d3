"""Resuming a run that was interrupted: which run it is, and where its checkpoint is."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from okddip import invocation
from okddip.errors import ConfigError, check_number
from okddip.files import copy, link, sync_folder, writing
from okddip.older_versions import FIRST_EPOCH, first_epoch
from okddip.run.folder import Run, RunFolder, restarted_jobs
from okddip.run.identity import dataset_digests, fingerprint, run_identity
from okddip.run.own_code import CODE, code_digest
from okddip.run.references import find_checkpoint
from okddip.run.same_run import check_is_last, check_same_settings, same_but_for_length
from okddip.text import ONCE, for_shell, for_shell_word
from okddip.tracking.address import absolute_uri
from okddip.tracking.tracker import MLflow, NoTracking
from okddip.training import checkpoint
from okddip.training.checkpoint import REQUIRED_KEYS, TRAINING_KEYS

log = logging.getLogger(__name__)


@contextmanager
def open_run(config: DictConfig, folder: Path, *, patient: bool = False) -> Iterator[Run]:
    """Resume the run that `trainer.resume` names, or begin a new one in `folder`; and hold its folder.

    Args:
        config: of the run.
        folder: for a new one.
        patient: wait for the run if another process is running it, and then resume what it left.

    Raises:
        ConfigError: there is no such run, it was made with other settings, or it is still running.
    """
    check_number("trainer.epochs", config.trainer.epochs, minimum=1, integer=True)
    run = find_run(config, folder)
    with run.folder.lock(patient=patient):
        if run.reopened:
            reopen(run, config)
        elif run.copied_from is not None:
            copy_checkpoint(run, config, run.copied_from)
        else:
            begin(run, config)
        yield run


def find_run(config: DictConfig, folder: Path) -> Run:
    """Find the run that `trainer.resume` names; a new one in `folder` if it names none.

    `auto` is the newest run with this very configuration and these images among the neighbours of `folder`,
    or else of the unfinished ones in the store that are on this machine, if there is one. Else a run is named
    by its folder, by its `last.pt`, or as `runs:/ID`; and a checkpoint that lies in no run's folder by its
    path. Before all that, a job that Slurm requeued or torchrun restarted resumes the run that it began.

    Raises:
        ConfigError: there is no such run.
    """
    reference = config.trainer.resume
    new = Run(RunFolder(folder))
    if reference is not None and not (isinstance(reference, str) and reference):
        raise ConfigError(f"trainer.resume={reference}: must be null, auto, a path or runs:/ID.")
    if restarted_jobs() and (begun := newest_run(config, folder, of_this_job=True)):
        return Run(RunFolder(begun), reopened=True)
    if reference is None:
        return new
    if reference == "auto":
        found = newest_run(config, folder) or newest_run_in_store(config)
        if found is not None:
            return Run(RunFolder(found), reopened=True)
        log.info(
            "A new run: %s and the store have none with this configuration to resume.",
            folder.parent,
            extra=ONCE,
        )
        return new
    if reference.startswith("runs:/"):
        run_id, _, name = reference.removeprefix("runs:/").partition("/")
        check_is_last(reference, name or "last.pt")
        own = folder_of_tracked_run(config, run_id)
        if own is not None:
            return Run(RunFolder(own), tracking_id=run_id, reopened=True)
        artifact = find_checkpoint("trainer.resume", reference, config.tracking.get("uri"))
        return Run(RunFolder(folder), tracking_id=run_id, copied_from=artifact)
    path = Path(reference).expanduser().absolute()
    if (path / "run.json").exists():
        return Run(RunFolder(path), reopened=True)
    path = find_checkpoint("trainer.resume", str(path), None)
    path = path.resolve() if path.is_symlink() else path
    if not (path.parent / "run.json").exists():
        return Run(RunFolder(folder), copied_from=path)
    check_is_last(reference, path.name)
    return Run(RunFolder(path.parent), reopened=True)


def begin(run: Run, config: DictConfig) -> None:
    """Mark a folder as that of a new run.

    Raises:
        ConfigError: there is a run in it already.
    """
    folder, code = run.folder.path, code_digest(config)
    if (folder / "last.pt").exists():
        of_then = "" if run.folder.metadata.get(CODE, code) == code else " and code"
        raise ConfigError(
            f"{folder}: there is a run in this folder already. Name another folder in hydra.run.dir (for a"
            " sweep in hydra.sweep.dir), or resume that run with trainer.resume=auto and its own settings"
            f"{of_then}."
        )
    with writing(folder):
        (folder / "metrics.jsonl").unlink(missing_ok=True)  # of a run that was killed before a checkpoint
    facts = {"identity": run_identity(config), CODE: code}
    run.folder.record_job(**facts, **{FIRST_EPOCH: str(run.first_epoch)})


def reopen(run: Run, config: DictConfig) -> None:
    """Read the last whole checkpoint of a run that is resumed in its own folder, if it got as far.

    Args:
        run: which may know its MLflow run already.
        config: must be the run's; it may be longer.
    """
    folder, metadata = run.folder.path, run.folder.metadata
    run.tracking_id = run.tracking_id or metadata.get("tracking_id")
    run.store = metadata.get("store")
    if any((folder / name).exists() for name in ("last.pt", "previous.pt")):
        run.state = checkpoint.load_last(folder)
        checkpoint.warn_of_other_version(run.state, folder)
        check_same_settings(config, run.state, folder)
    if run.state is not None or run.folder.read_metrics():  # else an older version left nothing to go on with
        run.first_epoch = first_epoch(metadata if run.state is None else run.state)
    with writing(folder):
        for leftover in [*folder.glob("*.new"), *folder.glob("*.tmp")]:
            leftover.unlink()
    run.folder.repair_metrics(run.state)
    # a run that is lengthened has its new identity when its images are found to be the same
    facts = {} if run.state else {"identity": run_identity(config)}
    known, code = metadata.get(CODE), code_digest(config)
    if known is not None and known.rpartition("+")[2] != code:
        log.warning("%s: your own code has changed; the epochs until now are of the code before.", folder)
        facts[CODE] = f"{known}+{code}"  # which no other run has
    run.folder.record_job(**facts, **{FIRST_EPOCH: str(run.first_epoch)})


def copy_checkpoint(run: Run, config: DictConfig, path: Path) -> None:
    """Resume in a new folder from a checkpoint that lies in no run's folder.

    Args:
        run: the new one; knows its MLflow run if the checkpoint is an artifact of it.
        config: must be the checkpoint's; it may be longer.
        path: of the checkpoint; `best.pt` and `metrics.jsonl` beside it come along if they are of its run.
    """

    def beside(name: str) -> Path:
        if run.tracking_id is None:
            return path.with_name(name)
        artifact = f"runs:/{run.tracking_id}/{name}"
        return find_checkpoint("trainer.resume", artifact, config.tracking.get("uri"))

    state = checkpoint.load(path, REQUIRED_KEYS | TRAINING_KEYS)
    checkpoint.warn_of_other_version(state, path)
    check_same_settings(config, state, path)
    run.first_epoch = first_epoch(state)
    begin(run, config)
    run.state = state
    if run.tracking_id is not None:
        run.folder.update_metadata(tracking_id=run.tracking_id)
    try:
        lines = RunFolder(beside("metrics.jsonl").parent).read_metrics()
    except ConfigError:
        lines = []
    last = state["epoch"] + run.first_epoch
    if any(line[:2] == (last, state["timestamp_ms"]) for line in lines):
        run.folder.write_metrics([line for line in lines if line[0] <= last])
    run.folder.repair_metrics(state)
    folder = run.folder.path
    with writing(folder):
        copy(path, folder / "last.new")
        best = state["history"].get("best", {}).get("epoch")
        if best == state["epoch"]:
            link(folder / "last.new", folder / "best.pt")
        elif best is not None:
            try:
                copy_best(beside("best.pt"), folder, state)
            except ConfigError as error:
                log.warning("The checkpoint of the best epoch so far, %d, is not here: %s", best + 1, error)
        (folder / "last.new").replace(folder / "last.pt")
        sync_folder(folder)


def copy_best(path: Path, folder: Path, state: dict[str, Any]) -> None:
    """Copy the checkpoint of the best epoch of the run whose last checkpoint is `state`.

    Raises:
        ConfigError: the file is of another run, or no checkpoint.
    """
    best = checkpoint.load(path)
    if best["epoch"] != state["history"]["best"]["epoch"] or not same_but_for_length(best, state):
        raise ConfigError(f"{path}: is of another run.")
    copy(path, folder / "best.pt")


def newest_run(config: DictConfig, folder: Path, *, of_this_job: bool = False) -> Path | None:
    """The folder of the run last begun with this configuration (in this job), looking beside `folder`.

    Runs on other images, or with other code of one's own, are other runs, except in this job.
    """
    # outputs/NAME/TIME has neighbours outputs/NAME/*; a job's multirun/TIME/JOB has multirun/*/*
    notes = {*folder.glob("run.json"), *folder.parent.glob("*/run.json")}
    if (folder.parent / "multirun.yaml").exists():
        notes |= {*folder.parent.parent.glob("*/*/run.json")}
    runs = {path: RunFolder(path.parent) for path in notes}
    if of_this_job:
        jobs = restarted_jobs()
        runs = {path: run for path, run in runs.items() if jobs & set(run.metadata.get("job", "").split())}
    wanted = run_identity(config)
    runs = {path: run for path, run in runs.items() if run.identity == wanted}
    if not of_this_job and any("data" in run.metadata for run in runs.values()):
        ours = fingerprint(dataset_digests(config))
        runs = {path: run for path, run in runs.items() if run.metadata.get("data", ours) == ours}
    if not of_this_job:
        runs = {path: run for path, run in runs.items() if has_code_of(run, config)}
    return max(runs, key=lambda path: path.stat().st_mtime).parent if runs else None


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
    for tracked in tracker.find({"identity": wanted, **tags}):
        folder = RunFolder(Path(tracked.data.tags.get("folder", "")))
        if tracked.info.status == "FINISHED" or not (folder.path / "run.json").exists():
            continue
        if folder.identity == wanted and has_code_of(folder, config):
            known = folder.metadata.get("data")
            if known is None or known == fingerprint(dataset_digests(config)):
                return folder.path
    return None


def has_code_of(folder: RunFolder, config: DictConfig) -> bool:
    """Whether a run was made with the code of one's own that there is now, as far as its folder says."""
    code = code_digest(config)
    if folder.metadata.get(CODE, code) == code:
        return True
    log.info(
        "%s: a run of this configuration, but your own code was another. trainer.resume=%s goes on with it.",
        *(folder.path, for_shell_word(str(folder.path))),
    )
    return False


def folder_of_tracked_run(config: DictConfig, run_id: str) -> Path | None:
    """The folder of an MLflow run, if it is on this machine.

    Raises:
        ConfigError: the store does not answer.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    tracker = instantiate(config.tracking)
    if not isinstance(tracker, MLflow):
        return None  # find_checkpoint says what is wrong
    tracker.open()
    try:
        tags = MlflowClient(absolute_uri(tracker.uri)).get_run(run_id).data.tags
    except MlflowException:
        return None  # again
    folder = Path(tags.get("folder", ""))
    return folder if (folder / "run.json").exists() else None


def find_tracked_run(run: Run, tracker: MLflow | NoTracking, reference: str | None) -> None:
    """Find the MLflow run of a resumed run that does not know it.

    It was killed before it could write the ID down, or `run.json` is damaged; or it was resumed in another
    store or another experiment in between.
    """
    if run.reopened and (run.tracking_id is None or reference == "auto"):
        found = [
            tracked.info.run_id
            for tracked in tracker.find({"folder": str(run.folder.path)})
            if not {"kind", "task"} & tracked.data.tags.keys()  # an evaluation may write there too
        ]
        if found and run.tracking_id not in found:
            run.tracking_id = found[0]


def resume_hint(reference: str = "auto") -> str:
    """The command that resumes the run of this process.

    Args:
        reference: for `trainer.resume`.
    """
    arguments = [
        argument for argument in invocation.arguments() if not argument.startswith("trainer.resume=")
    ]
    return f"Resume with: {for_shell(['okddip', *arguments, f'trainer.resume={reference}'])}"
