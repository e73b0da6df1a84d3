"""What a sweep's jobs learn from the environment, which reaches them under any launcher."""

from __future__ import annotations

import os

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from okddip.run.identity import SAME_IMAGES

# reach the jobs under any launcher
NAME, PARENT_RUN, START = "OKDDIP_SWEEP", "OKDDIP_PARENT_RUN", SAME_IMAGES
PROCESS = "OKDDIP_SWEEP_PROCESS"
UNNAMED = "OKDDIP_SWEEP_UNNAMED"  # what is swept and does not show in the setting `name`
TRAINED_FOR = "trained_for"  # the tag of a teacher: the parent run
LONGEST_VALUE = 24  # letters of a value in the name of a run

NO_CHDIR = (
    "hydra.job.chdir=true: would make another place of each relative path, and another store of each run's"
    " tracking.uri. Leave it out; a run's files are in its output folder in any case."
)


def is_job() -> bool:
    """Whether what runs is a job of a sweep."""
    return not OmegaConf.is_missing(HydraConfig.get().job, "num")


def job_tags() -> dict[str, str]:
    """What a job's run says of its sweep."""
    tags = {"sweep": os.environ.get(NAME, ""), "mlflow.parentRunId": os.environ.get(PARENT_RUN, "")}
    return {key: value for key, value in tags.items() if value}


def teacher_tags() -> dict[str, str]:
    """What the run of a teacher that a job trains says of the sweep; it is no child of the parent."""
    parent = os.environ.get(PARENT_RUN, "")
    return {TRAINED_FOR: parent} if parent else {}


def run_name(config: DictConfig) -> str:
    """What a run is called in MLflow: its name, in a sweep after what the name does not show.

    Ahead of it, since MLflow's column of names shows their beginnings.
    """
    unnamed = os.environ.get(UNNAMED, "").split()
    task = HydraConfig.get().overrides.task
    given = dict(override.lstrip("+").split("=", 1) for override in task if "=" in override)
    words = [f"{key.rpartition('.')[2]}={shortened(given[key])}" for key in unnamed if key in given]
    return " ".join([*words, config.name])


def shortened(value: str) -> str:
    """The end of a long value: that of a path tells more than its beginning."""
    return value if len(value) <= LONGEST_VALUE else f"...{value[3 - LONGEST_VALUE :]}"
