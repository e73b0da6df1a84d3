"""The run of a configuration that there is already: finished, interrupted, or running in another process."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from hydra.utils import instantiate
from omegaconf import DictConfig

from okddip.errors import ConfigError
from okddip.files import locks_in
from okddip.run.identity import dataset_digests, run_identity
from okddip.run.own_code import CODE, code_digest
from okddip.tracking.address import without_credentials
from okddip.tracking.params import digests_of

if TYPE_CHECKING:  # sweeps begin before anything heavy is imported
    from mlflow.entities import Run

log = logging.getLogger(__name__)


@contextmanager
def one_process_at_a_time(config: DictConfig) -> Iterator[None]:
    """Let one process at a time work on a run: two that want the same one do not train it twice.

    Raises:
        ConfigError: the folder for its lock cannot be written.
    """
    uri = config.tracking.get("uri")
    store = f"{without_credentials(uri)} {config.tracking.experiment}" if uri else str(Path.cwd())
    name = hashlib.sha256(f"{run_identity(config)} {store}".encode()).hexdigest()[:16]
    file = locks_in(Path(config.dataset.cache_dir).expanduser()) / name
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info(
                "%s: another process is training this run; waiting for it. (If none is, remove %s.)",
                *(config.name, file),
            )
            lock.acquire()
    except OSError as error:  # also a file of somebody else's, or a file system without locks
        raise ConfigError(
            f"dataset.cache_dir={config.dataset.cache_dir}: cannot be written ({error.strerror})."
            " Name another folder, here or in OKDDIP_CACHE."
        ) from error
    try:
        yield
    finally:
        lock.release()


def finished_runs(config: DictConfig, everywhere: bool = False, parent: str | None = None) -> Iterator[Run]:
    """Finished MLflow runs of this configuration, code and images in tracking's experiment, newest first.

    Args:
        config: of the run.
        everywhere: look in all experiments of the store.
        parent: look among the children of this run alone.

    Raises:
        ConfigError: the store cannot be opened, or the images that are to be compared cannot be had.
    """
    tracker = instantiate(config.tracking)
    tracker.open()
    under = {} if parent is None else {"mlflow.parentRunId": parent}
    code = code_digest(config)
    for run in tracker.find({"identity": run_identity(config), **under}, everywhere):
        if run.info.status == "FINISHED" and "final/top1" in run.data.metrics:
            if run.data.tags.get(CODE, code) != code:
                log.info(
                    "MLflow run %s has the same settings, but your own code was another.", run.info.run_id
                )
            elif digests_of(run) == dataset_digests(config):
                yield run
            else:
                log.info(
                    "MLflow run %s has the same settings, but was trained on other images.", run.info.run_id
                )


def interrupted_run(config: DictConfig, parent: str) -> str | None:
    """The folder of the interrupted run of this configuration under a parent run, if there is one."""
    from okddip.run.resume import newest_run_in_store  # imports torch

    folder = newest_run_in_store(config, {"mlflow.parentRunId": parent}) if parent else None
    return None if folder is None else str(folder)
