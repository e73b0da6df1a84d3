"""What a run needs to go on, and what it leaves behind: written whole or not at all."""

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

from okddip.errors import ConfigError


def save(state: dict[str, Any], folder: Path, *, best: bool) -> None:
    """Write `last.pt`; the one before it becomes `previous.pt`, and the best so far is linked as `best.pt`.

    At every moment `last.pt` is a whole checkpoint, whatever happens to the process.
    """
    last = folder / "last.pt"
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
        temporary = Path(file.name)
        try:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            temporary.unlink()
            raise
    if last.exists():
        link(last, folder / "previous.pt")
    temporary.replace(last)
    if best:
        link(last, folder / "best.pt")


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Only tensors and plain data are unpickled.

    Raises:
        ConfigError: the file is no whole checkpoint of this program.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"{path}: cannot be read as a checkpoint ({str(error).splitlines()[0]})."
        ) from error
    if not isinstance(state, dict) or "group" not in state or "config" not in state:
        raise ConfigError(f"{path}: is no checkpoint of this program.")
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

    run_id, _, name = reference.removeprefix("runs:/").partition("/")
    try:
        return Path(download_artifacts(f"runs:/{run_id}/{name or 'last.pt'}", tracking_uri=tracking_uri))
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
