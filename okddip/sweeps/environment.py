"""What the jobs of a sweep know about it, from environment variables: they reach a job under any launcher."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from okddip.run.identity import SAME_IMAGES

if TYPE_CHECKING:  # sweeps begin before anything heavy is imported
    from mlflow.entities import Run

SWEEP = "OKDDIP_SWEEP"  # a `SweepInfo` as JSON
START = SAME_IMAGES  # a word for this start of the sweep
TRAIN = "okddip.tasks.train.train"
TRAINED_FOR = "trained_for"  # the tag of a teacher: the parent run of the sweep
NO_SWEEP = "a run in no sweep"
LONGEST_VALUE = 24  # letters of a value in the name of a run


@dataclass
class SweepInfo:
    """What the jobs of a sweep know about it; outside of a sweep, nothing."""

    process: int = 0  # that of the sweep itself
    name: str = ""
    parent_run: str = ""  # its ID in MLflow
    jobs: int = 0  # how many it has, if that is known
    unnamed: list[str] = field(default_factory=list)  # what is swept and not part of the setting `name`
    threads_named: bool = False  # whether the user has set OMP_NUM_THREADS; launchers set it for jobs

    def publish(self) -> None:
        os.environ[SWEEP] = json.dumps(asdict(self))

    @classmethod
    def read(cls) -> SweepInfo:
        return cls(**json.loads(os.environ.get(SWEEP, "{}")))


def announce_jobs(jobs: int) -> None:
    """Let each job know how many there are; 0: nobody knows."""
    sweep = SweepInfo.read()
    sweep.jobs = jobs
    sweep.publish()


def is_job() -> bool:
    """Whether this run is a job of a sweep."""
    return not OmegaConf.is_missing(HydraConfig.get().job, "num")


def is_training(config: DictConfig) -> bool:
    return bool(config.task._target_ == TRAIN)


def job_tags() -> dict[str, str]:
    """The tags by which a job's run names its sweep."""
    sweep = SweepInfo.read()
    tags = {"sweep": sweep.name, "mlflow.parentRunId": sweep.parent_run}
    return {key: value for key, value in tags.items() if value}


def teacher_tags() -> dict[str, str]:
    """The tags of a teacher that a run trains first; in a sweep it is a child of the parent, but no job."""
    parent = SweepInfo.read().parent_run
    return {TRAINED_FOR: parent, "mlflow.parentRunId": parent} if parent else {TRAINED_FOR: NO_SWEEP}


def is_teacher(run: Run) -> bool:
    """Whether a run was trained first as the teacher of another, and is no job of a sweep."""
    return TRAINED_FOR in run.data.tags and "sweep" not in run.data.tags


def objective(metrics: Mapping[str, float]) -> float:
    """By what settings are chosen: top-1 on images held out of training, or on the test images without any.

    Args:
        metrics: after the last epoch, of the trainer or of MLflow.
    """
    return next(metrics[name] for name in ("val/top1", "final/top1", "test/top1") if name in metrics)


def run_name(config: DictConfig) -> str:
    """The name of a run in MLflow: the setting `name`; in a sweep after the swept values that it lacks.

    They come first, since MLflow's column of names shows only the beginning.
    """
    overrides = HydraConfig.get().overrides.task
    given = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
    swept = [key for key in SweepInfo.read().unnamed if key in given]
    return " ".join([*(f"{key.rpartition('.')[2]}={shortened(given[key])}" for key in swept), config.name])


def shortened(value: str) -> str:
    """The end of a long value: that of a path says more than its beginning."""
    return value if len(value) <= LONGEST_VALUE else f"...{value[3 - LONGEST_VALUE :]}"
