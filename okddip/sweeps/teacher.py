"""The teacher of classic distillation, where `method.teacher=auto` leaves it to the program."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from okddip import distributed
from okddip.errors import ConfigError
from okddip.run import resume
from okddip.sweeps import sweep
from okddip.tasks import train as tasks
from okddip.training import checkpoint

if TYPE_CHECKING:
    from mlflow.entities import Run

log = logging.getLogger(__name__)


def provide(config: DictConfig, build: Callable[[DictConfig], tasks.Parts]) -> str:
    """A finished baseline run of `method.teacher_model`, trained now if there is none.

    Data set, seed and training settings are those of the student. Of several processes that want the same
    teacher one trains it, and the others wait.

    Args:
        config: of the student's run; resolved.
        build: instantiates the parts of a configuration.

    Returns:
        Where its checkpoint is: a folder, or `runs:/ID`.

    Raises:
        ConfigError: there is no such model, or the teacher's run fails.
    """
    teacher = configuration(config)
    with sweep.only_one(teacher) if distributed.rank() == 0 else nullcontext():
        if found := distributed.from_rank_0(lambda: finished(teacher)):
            return found
        # always the same folder: a teacher that was cut off is found there, with or without a store
        data = distributed.from_rank_0(lambda: resume.fingerprint(resume.digests(teacher)))
        folder = Path("outputs", teacher.name, f"{resume.identity(teacher)}-{data}").absolute()
        goes_on = distributed.from_rank_0(lambda: resume.newest(teacher, folder) is not None)
        log.info("teacher    %s, %s first", teacher.name, "goes on" if goes_on else "trained")
        if distributed.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
        tasks.train(teacher, build, folder)
        # one that was begun elsewhere is where the store says
        begun = distributed.from_rank_0(lambda: resume.newest(teacher, folder) or finished(teacher))
        return str(begun)


def finished(teacher: DictConfig) -> str | None:
    """Where the checkpoint of a teacher is that was trained before."""
    for run in sweep.finished_runs(teacher, everywhere=True):
        place = where(run)
        try:
            checkpoint.find("method.teacher", place, teacher.tracking.uri)
        except ConfigError as error:  # it kept none, or has lost it
            log.info("teacher    MLflow run %s is passed over: %s", run.info.run_id, error)
            continue
        log.info("teacher    %s, finished as MLflow run %s", teacher.name, run.info.run_id)
        return place
    return None


def configuration(config: DictConfig) -> DictConfig:
    """The configuration of a student's teacher: a baseline with everything else the same.

    Raises:
        ConfigError: there is no such model.
    """
    model = config.method.teacher_model
    if ".." in str(model).split("/"):  # a checkpoint's, say, whose word chooses among the options alone
        raise ConfigError(f"method.teacher_model={model}: must be an option of conf/model.")
    try:
        options = compose(HydraConfig.get().job.config_name, ["method=baseline", f"model={model}"])
    except HydraException as error:
        reason = str(error).partition("\nConfig search path")[0].rstrip()
        raise ConfigError(f"method.teacher_model={model}: {reason}") from None
    teacher = copy.deepcopy(config)
    for key in ("method", "model"):
        teacher[key] = OmegaConf.create(OmegaConf.to_container(options[key], resolve=True))
    teacher.options.method, teacher.options.model = "baseline", model
    teacher.name = f"baseline1-seed{config.seed}-{teacher.method.structure}-{model}-{config.options.dataset}"
    teacher.trainer.resume, teacher.trainer.rerun = "auto", False
    return teacher


def where(run: Run) -> str:
    """The checkpoint of a finished run: its folder if that is on this machine, else the artifact."""
    folder = Path(run.data.tags.get("folder", ""))
    return str(folder) if (folder / "last.pt").exists() else f"runs:/{run.info.run_id}"


def described(state: dict[str, Any]) -> dict[str, str]:
    """Tags that say what a teacher is, wherever it lies.

    `teacher` is the same for every seed: the model, and a word for its settings and images. Which of its kind
    it is say `teacher.seed` and `teacher.epoch`.

    Args:
        state: its checkpoint.
    """
    config = state["config"]
    identity = resume.identity({**config, "seed": None}, state.get("lengths", []))
    facts = {"identity": identity, **state.get("digests", {})}
    return {
        "teacher": f"{config['options']['model']}-{resume.fingerprint(facts)[:6]}",
        "teacher.seed": str(config["seed"]),
        "teacher.epoch": str(state["epoch"] + 1),
    }
