"""What a run needs to go on, and what it leaves behind: written whole or not at all."""

import logging
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from okddip.errors import ConfigError

log = logging.getLogger(__name__)

# what damaged files make of zipfile and torch.load
UNREADABLE = (
    *(OSError, RuntimeError, EOFError, ValueError, KeyError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, UnicodeDecodeError),
)


def save(state: dict[str, Any], folder: Path, *, best: bool) -> None:
    """Write `last.pt`; the one before it becomes `previous.pt`, and the best so far is linked as `best.pt`.

    At every moment `last.pt` is a whole checkpoint, whatever happens to the process.

    Raises:
        ConfigError: the file cannot be written (a full disk, say); what was there is as before.
    """
    last = folder / "last.pt"
    try:
        write(last.with_suffix(".new"), lambda file: torch.save(state, file))
        if last.exists():
            link(last, folder / "previous.pt")
        if best:  # before `last.pt`: cut off between them, the epoch is trained again, with the same weights
            link(last.with_suffix(".new"), folder / "best.pt")
        last.with_suffix(".new").replace(last)
    except BaseException as error:
        last.with_suffix(".new").unlink(missing_ok=True)
        if not isinstance(error, OSError | RuntimeError):
            raise
        raise ConfigError(
            f"{last}: the checkpoint cannot be written ({str(error).splitlines()[0]}). The one before is"
            " whole; make room and go on with trainer.resume=auto."
        ) from error


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Fill a file and see it onto the disk."""
    with path.open("wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    temporary = path.with_name(path.name + ".new")
    write(temporary, lambda file: file.write(text.encode()))
    temporary.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Only tensors and plain data are unpickled.

    A checkpoint is a zip archive, which carries a checksum of each of its parts; torch.load does not look.

    Raises:
        ConfigError: the file is no whole checkpoint of this program.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{path}: cannot be read as a checkpoint ({reason}).") from error
    if not isinstance(state, dict) or "group" not in state or "config" not in state:
        raise ConfigError(f"{path}: is no checkpoint of this program.")
    return state


def load_or_previous(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or `previous.pt` beside it where it is damaged.

    Raises:
        ConfigError: neither is whole.
    """
    try:
        return load(path)
    except ConfigError as error:
        previous = path.with_name("previous.pt")
        if path.name != "last.pt" or not previous.exists():
            raise
        log.warning("%s Taking %s, of the epoch before.", error, previous)
        state = load(previous)
        previous.replace(path)  # or the next checkpoint would put the damaged one in its place
        return state


def find(key: str, reference: str, tracking_uri: str | None) -> Path:
    """The file that a setting names.

    Args:
        key: of the setting, for messages.
        reference: the path of a checkpoint or of a run's folder, or `runs:/ID` of an MLflow run, whose
            `last.pt` it is, or `runs:/ID/best.pt`.
        tracking_uri: the MLflow store in which to look for runs; None: there is none.

    Raises:
        ConfigError: there is no such file or run.
    """
    if not reference.startswith("runs:/"):
        path = Path(reference).expanduser()
        path = path / "last.pt" if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(f"{key}={reference}: there is no such checkpoint. Name a file, or runs:/ID.")
        return path
    if tracking_uri is None:
        raise ConfigError(f"{key}={reference}: needs an MLflow store; set tracking=mlflow, or name a file.")
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    from okddip.tracking import absolute

    run_id, _, name = reference.removeprefix("runs:/").partition("/")
    try:
        return Path(
            download_artifacts(f"runs:/{run_id}/{name or 'last.pt'}", tracking_uri=absolute(tracking_uri))
        )
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"{key}={reference}: {tracking_uri} has no such run with a checkpoint"
            f" ({str(error).splitlines()[0]}). Runs with tracking.checkpoints=false have none;"
            " name the file instead."
        ) from error


def link(source: Path, target: Path) -> None:
    """Let `target` be the same file as `source`, replacing what was there in one step."""
    temporary = target.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(source)
    except OSError:  # some file systems have no hard links
        temporary.write_bytes(source.read_bytes())
    temporary.replace(target)
