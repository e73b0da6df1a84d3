"""The teachers of knowledge distillation: finished runs that are found, or trained first."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from okddip import distributed
from okddip.errors import ConfigError
from okddip.files import remove_unused
from okddip.run import resume
from okddip.run.identity import dataset_digests, fingerprint, run_identity
from okddip.run.own_code import code_digest
from okddip.run.references import find_checkpoint
from okddip.sweeps.same_run import finished_runs, one_process_at_a_time
from okddip.sweeps.teacher_checkpoint import read_teacher

log = logging.getLogger(__name__)

Train = Callable[..., float]


def open_teachers(config: DictConfig, train: Train) -> list[tuple[str, dict[str, Any]]]:
    """The teachers that `method.teacher` names, or leaves to the program (`auto`): reference and checkpoint.

    Args:
        config: of the student's run; resolved.
        train: see `provide_teacher`.

    Raises:
        ConfigError: there is no such checkpoint, or it names parts that are not trusted.
    """
    found = []
    for name, teacher in teacher_references(config):
        reference = provide_teacher(teacher, train) if teacher is not None else name
        state = distributed.from_rank_0(partial(read_teacher, config, reference))
        found.append((name, state))
    return found


def teacher_references(config: DictConfig) -> list[tuple[str, DictConfig | None]]:
    """What `method.teacher` names, one by one; with the configuration of each that is `auto`.

    The first `auto` has the student's seed, the next one the seed after it, and so on: a student of the next
    seed shares all of its teachers but one.

    Raises:
        ConfigError: there is no such model.
    """
    named = config.method.teacher
    names = list(named) if isinstance(named, ListConfig) else [named]
    references: list[tuple[str, DictConfig | None]] = []
    for place, name in enumerate(names):
        seed = config.seed + names[:place].count("auto")
        references.append((name, teacher_config(config, seed) if name == "auto" else None))
    return references


def provide_teacher(teacher: DictConfig, train: Train) -> str:
    """A finished run of a teacher's configuration, trained now if there is none.

    Of several processes that want the same teacher one trains it, and the others wait.

    Args:
        teacher: see `teacher_config`.
        train: does a run of its own in a folder, `train(config, teacher_folder=folder)`.

    Returns:
        Where its checkpoint is: a folder, or `runs:/ID`.

    Raises:
        ConfigError: the teacher's run fails.
    """
    with one_process_at_a_time(teacher) if distributed.rank() == 0 else nullcontext():
        if found := distributed.from_rank_0(lambda: finished_teacher(teacher)):
            return found
        folder = distributed.from_rank_0(lambda: teacher_folder(teacher))
        try:
            train(teacher, teacher_folder=folder)
        except ConfigError:
            remove_unused([folder, folder.parent, folder.parent.parent])
            raise
        # a run that was begun elsewhere is where the store says
        trained = distributed.from_rank_0(
            lambda: resume.newest_run(teacher, folder) or finished_teacher(teacher)
        )
        return str(trained)


def finished_teacher(teacher: DictConfig) -> str | None:
    """Where the checkpoint of a teacher is that was trained before: its folder, or else `runs:/ID`."""
    for run in finished_runs(teacher, everywhere=True):
        folder = Path(run.data.tags.get("folder", ""))
        place = str(folder) if (folder / "last.pt").exists() else f"runs:/{run.info.run_id}"
        try:
            find_checkpoint("method.teacher", place, teacher.tracking.uri)
        except ConfigError as error:  # it kept none, or has lost it
            log.info("teacher    MLflow run %s cannot be used: %s", run.info.run_id, error)
            continue
        log.info("teacher    %s, finished as MLflow run %s", teacher.name, run.info.run_id)
        return place
    return None


def teacher_folder(teacher: DictConfig) -> Path:
    """The folder to train a teacher in; always the same, so that it is found again without a store."""
    data = fingerprint(dataset_digests(teacher))
    words = (run_identity(teacher), data, code_digest(teacher))
    folder = Path("outputs", teacher.name, "-".join(filter(None, words))).absolute()
    interrupted = resume.newest_run(teacher, folder) is not None
    log.info("teacher    %s, %s first", teacher.name, "resumed" if interrupted else "trained")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def teacher_config(config: DictConfig, seed: int) -> DictConfig:
    """The configuration of a student's teacher: a baseline with the same data set and training settings.

    Args:
        config: of the student's run; resolved.
        seed: of the teacher.

    Raises:
        ConfigError: there is no such model.
    """
    model = config.method.teacher_model
    if ".." in str(model).split("/"):  # of a checkpoint, say, which may choose among the options alone
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
    teacher.seed = seed
    teacher.name = f"baseline1-seed{seed}-{teacher.method.structure}-{model}-{config.options.dataset}"
    teacher.trainer.resume, teacher.trainer.rerun = "auto", False
    return teacher
