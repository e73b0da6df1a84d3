"""Files that are written whole or not at all, and flushed to the disk."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from okddip.errors import ConfigError

log = logging.getLogger(__name__)

UNUSED = (".hydra", "main.log", "run.lock")  # what is in the folder of a run that was refused


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write a file into an error that names it.

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
            " room, or make the folder writable, and give the command again; resume a run with"
            " trainer.resume=auto."
        ) from error


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Fill a file and flush it to the disk."""
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
    """Add a line to a file and flush it to the disk.

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
    """Flush the names of a folder's files to the disk: a power cut would undo what was renamed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems know no such thing
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """Copy a file and flush it to the disk."""
    with source.open("rb") as original:
        write(target, lambda file: shutil.copyfileobj(original, file))


def locks_in(cache_dir: Path) -> Path:
    """The folder of this user's lock files in a cache, which several users may share."""
    return cache_dir / f"locks-{os.getuid()}"


@contextmanager
def first_of_several(lock_file: Path, waiting: str) -> Iterator[None]:
    """Let the first of several processes make what the others then find, while these wait.

    They go on without the lock: what they do not find they make side by side, and not one after the other.
    So do all where files cannot be locked.

    Args:
        lock_file: its folder is made if absent.
        waiting: is logged if another process is the first.
    """
    held = FileLock(lock_file)
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=0)
    except Timeout:
        log.info("%s (If none is, remove %s.)", waiting, lock_file)
        with suppress(OSError), held:
            pass
    except OSError:
        pass
    try:
        yield
    finally:
        held.release()


def remove_unused(folders: Sequence[Path]) -> None:
    """Remove the folder of a run that was refused, if all that is in it was written before a run begins.

    Args:
        folders: that folder, and those around it that go too where they are empty; the innermost first.
    """
    if not folders or not {path.name for path in folders[0].iterdir()} <= set(UNUSED):
        return
    for handler in logging.root.handlers[:]:  # a log that is not begun would be opened in no folder
        if (
            isinstance(handler, logging.FileHandler)
            and Path(handler.baseFilename).parent == folders[0].absolute()
        ):
            logging.root.removeHandler(handler)
            handler.close()
    shutil.rmtree(folders[0], ignore_errors=True)
    with suppress(OSError):  # there is something in it
        for folder in folders[1:]:
            folder.rmdir()
