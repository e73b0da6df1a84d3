"""What a run needs to go on, and what it leaves behind: written whole or not at all."""

import logging
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

import okddip
from okddip.assembly import plain
from okddip.errors import ConfigError
from okddip.training.finite import not_finite

log = logging.getLogger(__name__)

UNSAFE = re.compile(r"(GLOBAL [\w.]+|(?:Trying to|Can only|Unsupported) [^\n]{1,100})")

# what everybody needs of a checkpoint, and what a run needs beside it to go on
KEYS = {
    **{"version": str, "config": dict, "epoch": int, "history": dict, "group": dict, "method": dict},
    **{"classes": list, "channels": int, "image_size": list, "mean": list, "std": list},
}
TRAINING_KEYS = {"timestamp_ms": int, "metrics": dict, "optimizer": dict, "scaler": dict}
# kinds of their items; what is text there may say whatever class and file names say
ITEMS: dict[str, Any] = {
    **{"classes": str, "digests": str, "image_size": int, "lengths": int},
    **{"mean": int | float, "std": int | float, "metrics": int | float, "history": int | float},
}
GROUPS = ("method", "model", "dataset", "optimizer", "scheduler", "trainer", "options")  # of its config


def save(state: dict[str, Any], folder: Path, *, best: bool) -> None:
    """Write `last.pt`; the one before it becomes `previous.pt`, and the best so far is linked as `best.pt`.

    At every moment `last.pt` is a whole checkpoint, whatever happens to the process.

    Raises:
        ConfigError: the file cannot be written (a full disk, say); what was there is as before.
    """
    last = folder / "last.pt"
    try:
        with writing(last):
            write(last.with_suffix(".new"), lambda file: torch.save(state, file))
            if last.exists():
                link(last, folder / "previous.pt")
            # the best before the last: cut off between them, the epoch is trained again, to the same weights
            if best:
                link(last.with_suffix(".new"), folder / "best.pt")
            last.with_suffix(".new").replace(last)
            sync_folder(folder)
    except BaseException:
        with suppress(OSError):
            last.with_suffix(".new").unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file that cannot be written.

    Raises:
        ConfigError: with the system's reason.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save closes its archive where the disk is full, and reports that it cannot
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise ConfigError(
            f"{path}: cannot be written ({cause.strerror or cause}). What was finished before is whole. Make"
            " room, or make the folder writable, and give the command again; a run goes on with"
            " trainer.resume=auto."
        ) from error


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Fill a file and see it onto the disk."""
    with path.open("wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step.

    Raises:
        ConfigError: it cannot be written; what was there is as before.
    """
    temporary = path.with_name(path.name + ".new")
    with writing(path):
        write(temporary, lambda file: file.write(text.encode()))
        temporary.replace(path)
        sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file and see it onto the disk.

    Raises:
        ConfigError: it cannot be written.
    """
    with writing(path):
        new = not path.exists()
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """See the names of a folder's files onto the disk: a power cut would undo what was renamed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems know no such thing
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: Path, keys: dict[str, type] | None = None) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Only tensors and plain data are unpickled.

    A checkpoint is a zip archive, which carries a checksum of each of its parts; torch.load does not look.

    Args:
        path: of the file.
        keys: what it must hold; by default what is needed to use its networks.

    Raises:
        ConfigError: the file is no whole checkpoint of this program, or its configuration is not resolved.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            refuse_inflated(archive, path)
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except pickle.UnpicklingError as error:
        # PyTorch's message goes on to say how to run what the file holds all the same
        found = UNSAFE.search(str(error))
        what = f" ({found[1].rstrip('.')})" if found else ""
        raise ConfigError(
            f"{path}: cannot be read as a checkpoint: it holds more than tensors and plain data{what}. It is"
            " damaged, or made to run code where it is opened: do not trust the file."
        ) from None
    except Exception as error:  # there is hardly one that a damaged pickle cannot raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{path}: cannot be read as a checkpoint ({reason}).") from error
    refuse_foreign(state, keys or KEYS, path)
    state["config"] = plain(state["config"], "", path)
    return state


def refuse_inflated(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse a zip archive that says of its parts that they are larger than the file, before they are read.

    PyTorch stores the parts of a checkpoint as they are.

    Raises:
        ConfigError: they are compressed, or lie over one another.
    """
    parts = archive.infolist()
    size = path.stat().st_size
    claimed = sum(part.file_size for part in parts)
    if claimed > size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ConfigError(
            f"{path}: is no checkpoint of this program: its parts would take {claimed:,} bytes, and the"
            f" file has {size:,}; a checkpoint is not compressed. Do not trust the file."
        )


def warn_of_other_version(state: dict[str, Any], source: object) -> None:
    """Say that another version of the program wrote a file: it may have computed otherwise."""
    if state["version"] != okddip.__version__:
        log.warning(
            "%s: was written by okddip %s, and this is okddip %s. Numbers may differ where the program has"
            " changed in between.",
            *(source, state["version"], okddip.__version__),
        )


def refuse_foreign(state: Any, keys: dict[str, type], path: Path) -> None:
    """Refuse what was saved by another program.

    Raises:
        ConfigError: names what is missing.
    """
    if not isinstance(state, dict):
        raise ConfigError(f"{path}: is no checkpoint of this program: it holds a {type(state).__name__}.")
    missing = [key for key, kind in keys.items() if not isinstance(state.get(key), kind)]
    if "config" not in missing:
        missing += [f"config.{group}" for group in GROUPS if not isinstance(state["config"].get(group), dict)]
    if missing:
        raise ConfigError(f"{path}: is no checkpoint of this program: it lacks {', '.join(missing)}.")
    for key, kind in ITEMS.items():
        items = state.get(key, ())
        for item in items.values() if isinstance(items, dict) else items:
            inner = item.values() if key == "history" and isinstance(item, dict) else [item]
            if not all(isinstance(value, kind) for value in inner):
                raise ConfigError(
                    f"{path}: is no checkpoint of this program: {key} holds a {type(item).__name__}."
                )


def load_last(folder: Path) -> dict[str, Any]:
    """Read a run's `last.pt` to go on from, or `previous.pt` where it is damaged.

    Raises:
        ConfigError: neither is whole.
    """
    path, previous = folder / "last.pt", folder / "previous.pt"
    keys = KEYS | TRAINING_KEYS
    try:
        return load(path, keys)
    except ConfigError as error:
        if not previous.exists():
            raise
        log.warning("%s Taking %s, of the epoch before.", error, previous)
        state = load(previous, keys)
        with writing(path):
            path.replace(folder / "damaged.pt")  # it may only have been unreadable at this moment
            previous.replace(path)  # or the next checkpoint would put the damaged one in its place
            sync_folder(folder)
        return state


def restore(state: dict[str, Any], **parts: Any) -> None:
    """Load the state of `group`, `method`, `optimizer` and whatever else is given by its key.

    Raises:
        ConfigError: it is not theirs: another version of the program wrote it, say. Or weights are not
            finite.
    """
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reasons = [line.strip() for line in (str(error).strip() or type(error).__name__).splitlines()]
            raise ConfigError(
                f"The checkpoint of epoch {state['epoch'] + 1}, written by okddip {state['version']}, does"
                f" not fit: {name}: {' '.join(reasons[:2])}"
            ) from error
        if broken := not_finite(part):
            raise ConfigError(
                f"The checkpoint of epoch {state['epoch'] + 1} holds numbers that are not finite ({name}:"
                f" {broken}), so that no loss is: its training has failed. Take another checkpoint, such as"
                " previous.pt or best.pt beside it, or train again."
            )


def find(key: str, reference: str, tracking_uri: str | None) -> Path:
    """The file that a setting names.

    Args:
        key: of the setting, for messages.
        reference: the path of a checkpoint or of a run's folder, or `runs:/ID` of an MLflow run, whose
            `last.pt` it is, or `runs:/ID/best.pt`.
        tracking_uri: the MLflow store in which to look for runs; None: there is none.

    Raises:
        ConfigError: there is no such file or run, or the store does not answer.
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

    from okddip.tracking.tracker import absolute, open_store

    open_store(tracking_uri)
    run_id, _, name = reference.removeprefix("runs:/").partition("/")
    try:
        return Path(
            download_artifacts(f"runs:/{run_id}/{name or 'last.pt'}", tracking_uri=absolute(tracking_uri))
        )
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"{key}={reference}: {tracking_uri} has no such run with a checkpoint"
            f" ({str(error).splitlines()[0]}). Runs that were cut off, and those with"
            " tracking.checkpoints=false, have none there; name the file instead."
        ) from error


def link(source: Path, target: Path) -> None:
    """Let `target` be the same file as `source`, replacing what was there in one step."""
    temporary = target.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(source)
    except OSError:  # some file systems have no hard links
        copy(source, temporary)
    temporary.replace(target)


def copy(source: Path, target: Path) -> None:
    """Copy a file and see it onto the disk."""
    with source.open("rb") as original:
        write(target, lambda file: shutil.copyfileobj(original, file))
