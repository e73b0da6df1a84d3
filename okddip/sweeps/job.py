"""One job of a sweep, from the look for a run that has done it already to what became of it."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from okddip.errors import ConfigError, Incompatible
from okddip.sweeps.environment import PARENT_RUN, START
from okddip.sweeps.joblib import while_sweep_lives
from okddip.sweeps.outcomes import Outcome, write_outcome

if TYPE_CHECKING:  # sweeps begin before anything heavy is imported
    from mlflow.entities import Run


log = logging.getLogger(__name__)

# what a job without a result returns: the worst value, for a sweeper that maximizes
NO_RESULT = float("-inf")
TRAIN = "okddip.tasks.train.train"


@while_sweep_lives()
def run_job(
    config: DictConfig, check: Callable[[DictConfig], None], task: Callable[[DictConfig], Any]
) -> Any:
    """Run a job of a sweep so that, whatever becomes of it, the others run too.

    A training run that is finished is not trained again, one that was cut off goes on.

    Args:
        config: of the job.
        check: resolves and checks it.
        task: what to do.

    Returns:
        What the task returns; minus infinity if it failed or was skipped.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    outcome = Outcome(
        HydraConfig.get().job.num,
        list(HydraConfig.get().overrides.task),
        "cut off",
        f"its process has not come to its end; see {folder}",
        start=os.environ.get(START, ""),
    )
    write_outcome(outcome, folder)
    outcome.kind, outcome.reason = "finished", ""
    value: Any = NO_RESULT
    try:
        check(config)
        # where it is forced, only what this very sweep has done counts
        parent = os.environ.get(PARENT_RUN, "") if config.trainer.rerun else None
        if config.task._target_ == TRAIN:
            with one_process_at_a_time(config):
                run = next(finished_runs(config, parent=parent), None)
                if run is not None:
                    outcome.kind, outcome.run_id = "finished before", run.info.run_id
                    value = run.data.metrics["final/top1"]
                    log.info("%s: finished before, as MLflow run %s.", config.name, run.info.run_id)
                else:
                    if config.trainer.resume is None:
                        config.trainer.resume = "auto" if parent is None else interrupted_run(config, parent)
                    value = task(config)
        else:
            value = task(config)
    except Incompatible as error:
        outcome.kind, outcome.reason = "skipped", str(error)
        log.info("Skipped: %s", error)
    except ConfigError as error:
        outcome.kind, outcome.reason = "failed", str(error)
        log.error("%s", error)
    except Exception as error:
        outcome.kind, outcome.reason = "failed", f"{type(error).__name__}: {error}"
        log.exception("Failed:")
    outcome.value = value if isinstance(value, int | float) else None
    write_outcome(outcome, folder)
    return value


def interrupted_run(config: DictConfig, parent: str) -> str | None:
    """Where the run of this configuration is that was cut off under a parent run, if there is one."""
    from okddip.run.resume import newest_run_in_store

    folder = newest_run_in_store(config, {"mlflow.parentRunId": parent}) if parent else None
    return None if folder is None else str(folder)


@contextmanager
def one_process_at_a_time(config: DictConfig) -> Iterator[None]:
    """Let one process at a time work on a run: two that want the same one do not train it twice."""
    from okddip.run.identity import run_identity
    from okddip.tracking.address import without_credentials

    uri = config.tracking.get("uri")
    store = f"{without_credentials(uri)} {config.tracking.experiment}" if uri else str(Path.cwd())
    name = hashlib.sha256(f"{run_identity(config)} {store}".encode()).hexdigest()[:16]
    folder = Path(config.dataset.cache_dir).expanduser() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"dataset.cache_dir={config.dataset.cache_dir}: cannot be written ({error.strerror})."
            " Name another folder, here or in OKDDIP_CACHE."
        ) from error
    lock = FileLock(folder / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: another process works on this very run; waiting for it.", config.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def finished_runs(config: DictConfig, everywhere: bool = False, parent: str | None = None) -> Iterator[Run]:
    """Finished MLflow runs with this configuration and these images in tracking's experiment, newest first.

    Args:
        config: of the run.
        everywhere: look in all experiments of the store.
        parent: look among the children of this run alone.

    Raises:
        ConfigError: the store cannot be opened, or the images that are to be compared cannot be had.
    """
    from okddip.run.identity import dataset_digests, run_identity
    from okddip.tracking.params import digests_of

    tracker = instantiate(config.tracking)
    tracker.open()
    under = {} if parent is None else {"mlflow.parentRunId": parent}
    for run in tracker.find({"identity": run_identity(config), **under}, everywhere):
        if run.info.status == "FINISHED" and "final/top1" in run.data.metrics:
            if digests_of(run) == dataset_digests(config):
                yield run
            else:
                log.info("MLflow run %s has these settings, and other images.", run.info.run_id)
