"""Checkpoints: what a run needs to resume and what it leaves behind, written whole or not at all."""

import logging
import pickle
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from okddip import files
from okddip.errors import ConfigError
from okddip.files import link, sync_folder, writing
from okddip.older_versions import updated
from okddip.plain_data import plain
from okddip.text import for_terminal
from okddip.training.finite import not_finite
from okddip.version import __version__

log = logging.getLogger(__name__)

UNPICKLING_REASON = re.compile(r"(GLOBAL [\w.]+|(?:Trying to|Can only|Unsupported) [^\n]{1,100})")

# what every use of a checkpoint needs, and what resuming needs besides
REQUIRED_KEYS = {
    **{"version": str, "config": dict, "epoch": int, "history": dict, "group": dict, "method": dict},
    **{"classes": list, "channels": int, "image_size": list, "mean": list, "std": list},
}
TRAINING_KEYS = {"timestamp_ms": int, "metrics": dict, "optimizer": dict, "scaler": dict}
# kinds of their items; what is text there may say whatever class and file names say
ITEM_TYPES: dict[str, Any] = {
    **{"classes": str, "digests": str, "image_size": int},
    **{"mean": int | float, "std": int | float, "metrics": int | float, "history": int | float},
}
CONFIG_TYPES: dict[str, Any] = {  # of its config
    **{"name": str, "seed": int, "trainer.epochs": int},
    **{f"options.{group}": str for group in ("method", "model", "dataset")},
}
MOST_EPOCHS = 10**7
CONFIG_GROUPS = (
    "method",
    "model",
    "dataset",
    "optimizer",
    "scheduler",
    "trainer",
    "options",
)  # of its config


def save(state: dict[str, Any], folder: Path, *, best: bool) -> None:
    """Write `last.pt`; the one before it becomes `previous.pt`, and the best so far is linked as `best.pt`.

    At every moment `last.pt` is a whole checkpoint, whatever happens to the process.

    Raises:
        ConfigError: the file cannot be written (a full disk, say); what was there is as before.
    """
    last = folder / "last.pt"
    try:
        with writing(last):
            files.write(last.with_suffix(".new"), lambda file: torch.save(state, file))
            if last.exists():
                link(last, folder / "previous.pt")
            # the best before the last: killed between them, the epoch is trained again, to the same weights
            if best:
                link(last.with_suffix(".new"), folder / "best.pt")
            last.with_suffix(".new").replace(last)
            sync_folder(folder)
    except BaseException:
        with suppress(OSError):
            last.with_suffix(".new").unlink(missing_ok=True)
        raise


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
            check_uncompressed(archive, path)
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except pickle.UnpicklingError as error:
        # PyTorch's message goes on to say how to run what the file holds all the same
        found = UNPICKLING_REASON.search(str(error))
        what = f" ({found[1].rstrip('.')})" if found else ""
        raise ConfigError(
            f"{path}: cannot be read as a checkpoint: it holds more than tensors and plain data{what}. It is"
            " damaged, or made to run code where it is opened: do not trust the file."
        ) from None
    except Exception as error:  # there is hardly one that a damaged pickle cannot raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{path}: cannot be read as a checkpoint ({reason}).") from error
    check_contents(state, keys or REQUIRED_KEYS, path)
    state["config"] = updated(plain(state["config"], "", path))
    check_values(state, path)
    return state


def check_uncompressed(archive: zipfile.ZipFile, path: Path) -> None:
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
            f"{path}: is not a checkpoint of this program: its parts would take {claimed:,} bytes, and the"
            f" file has {size:,}; a checkpoint is not compressed. Do not trust the file."
        )


def warn_of_other_version(state: dict[str, Any], source: object) -> None:
    """Say that another version of the program wrote a file: it may have computed otherwise."""
    if state["version"] != __version__:
        log.warning(
            "%s: was written by okddip %s, and this is okddip %s. Numbers may differ where the program has"
            " changed in between.",
            *(for_terminal(source), for_terminal(state["version"]), __version__),
        )


def check_contents(state: Any, keys: dict[str, type], path: Path) -> None:
    """Refuse what was saved by another program.

    Raises:
        ConfigError: names what is missing.
    """
    if not isinstance(state, dict):
        raise ConfigError(f"{path}: is not a checkpoint of this program: it holds a {type(state).__name__}.")
    missing = [key for key, kind in keys.items() if not isinstance(state.get(key), kind)]
    if "config" not in missing:
        missing += [
            f"config.{group}" for group in CONFIG_GROUPS if not isinstance(state["config"].get(group), dict)
        ]
    if missing:
        raise ConfigError(f"{path}: is not a checkpoint of this program: it lacks {', '.join(missing)}.")
    for key, kind in ITEM_TYPES.items():
        items = state.get(key, ())
        for item in items.values() if isinstance(items, dict) else items:
            inner = item.values() if key == "history" and isinstance(item, dict) else [item]
            if not all(isinstance(value, kind) for value in inner):
                raise ConfigError(
                    f"{path}: is not a checkpoint of this program: {key} holds a {type(item).__name__}."
                )


def check_values(state: dict[str, Any], path: Path) -> None:
    """See that a checkpoint's settings are all there, and that what it says of images and epochs can be.

    Raises:
        ConfigError: names what is missing, or cannot be.
    """
    for key, kind in CONFIG_TYPES.items():
        if not isinstance(value_at(state["config"], key), kind):
            raise ConfigError(f"{path}: is not a checkpoint of this program: it has no config.{key}.")
    sizes, channels = state["image_size"], state["channels"]
    can_be = {
        "epoch": 0 <= state["epoch"] < MOST_EPOCHS,
        "timestamp_ms": 0 <= state.get("timestamp_ms", 0) < 2**53,
        "history": all(isinstance(results, dict) for results in state["history"].values()),
        "digests": isinstance(state.get("digests", {}), dict),
        "image_size": len(sizes) == 2 and all(size > 0 for size in sizes),
        "mean": len(state["mean"]) == channels,
        "std": len(state["std"]) == channels and all(number > 0 for number in state["std"]),
    }
    if wrong := [key for key, fine in can_be.items() if not fine]:
        raise ConfigError(
            f"{path}: is not a checkpoint of this program: {wrong[0]} cannot be {str(state[wrong[0]])[:80]}."
        )


def value_at(config: dict[str, Any], key: str) -> Any:
    """The value under a dotted key; None if there is none."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def load_last(folder: Path) -> dict[str, Any]:
    """Read a run's `last.pt` to resume from, or `previous.pt` where it is damaged.

    Raises:
        ConfigError: neither is whole.
    """
    path, previous = folder / "last.pt", folder / "previous.pt"
    keys = REQUIRED_KEYS | TRAINING_KEYS
    try:
        return load(path, keys)
    except ConfigError as error:
        if not previous.exists():
            raise
        log.warning("%s Resuming from %s, of the epoch before.", error, previous)
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
