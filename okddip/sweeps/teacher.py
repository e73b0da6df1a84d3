"""The teacher of classic distillation: found, or trained first, and fit for the student's images."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from okddip import distributed
from okddip.deployment.predictors import rebuild
from okddip.errors import ConfigError, Incompatible
from okddip.run import resume
from okddip.run.identity import dataset_digests, fingerprint, run_identity
from okddip.run.references import find_checkpoint
from okddip.sweeps.job import finished_runs, one_process_at_a_time
from okddip.text import composed
from okddip.trust import trust_of

if TYPE_CHECKING:
    from mlflow.entities import Run

    from okddip.data.dataset import Dataset
    from okddip.models.backbone import Backbone

log = logging.getLogger(__name__)

Train = Callable[..., float]


def open_teacher(config: DictConfig, train: Train) -> dict[str, Any]:
    """The checkpoint of the teacher that `method.teacher` names, or leaves to the program (`auto`).

    Args:
        config: of the student's run; resolved.
        train: see `provide_teacher`.

    Raises:
        ConfigError: there is no such checkpoint, or it names parts that are not trusted.
    """
    reference = config.method.teacher
    if reference == "auto":
        reference = provide_teacher(config, train)
    return distributed.from_rank_0(lambda: read_teacher(config, reference))


def provide_teacher(config: DictConfig, train: Train) -> str:
    """A finished baseline run of `method.teacher_model`, trained now if there is none.

    Data set, seed and training settings are those of the student. Of several processes that want the same
    teacher one trains it, and the others wait.

    Args:
        config: of the student's run; resolved.
        train: does a run of its own in a folder, `train(config, teacher_folder=folder)`.

    Returns:
        Where its checkpoint is: a folder, or `runs:/ID`.

    Raises:
        ConfigError: there is no such model, or the teacher's run fails.
    """
    teacher = teacher_config(config)
    with one_process_at_a_time(teacher) if distributed.rank() == 0 else nullcontext():
        if found := distributed.from_rank_0(lambda: finished_teacher(teacher)):
            return found
        # always the same folder: a teacher that was cut off is found there, with or without a store
        data = distributed.from_rank_0(lambda: fingerprint(dataset_digests(teacher)))
        folder = Path("outputs", teacher.name, f"{run_identity(teacher)}-{data}").absolute()
        goes_on = distributed.from_rank_0(lambda: resume.newest_run(teacher, folder) is not None)
        log.info("teacher    %s, %s first", teacher.name, "goes on" if goes_on else "trained")
        if distributed.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
        train(teacher, teacher_folder=folder)
        # one that was begun elsewhere is where the store says
        begun = distributed.from_rank_0(
            lambda: resume.newest_run(teacher, folder) or finished_teacher(teacher)
        )
        return str(begun)


def finished_teacher(teacher: DictConfig) -> str | None:
    """Where the checkpoint of a teacher is that was trained before."""
    for run in finished_runs(teacher, everywhere=True):
        place = checkpoint_of_run(run)
        try:
            find_checkpoint("method.teacher", place, teacher.tracking.uri)
        except ConfigError as error:  # it kept none, or has lost it
            log.info("teacher    MLflow run %s is passed over: %s", run.info.run_id, error)
            continue
        log.info("teacher    %s, finished as MLflow run %s", teacher.name, run.info.run_id)
        return place
    return None


def teacher_config(config: DictConfig) -> DictConfig:
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


def checkpoint_of_run(run: Run) -> str:
    """The checkpoint of a finished run: its folder if that is on this machine, else the artifact."""
    folder = Path(run.data.tags.get("folder", ""))
    return str(folder) if (folder / "last.pt").exists() else f"runs:/{run.info.run_id}"


def describe_teacher(state: dict[str, Any]) -> dict[str, str]:
    """Tags that say what a teacher is, wherever it lies.

    `teacher` is the same for every seed: the model, and a word for its settings and images. Which of its kind
    it is say `teacher.seed` and `teacher.epoch`.

    Args:
        state: its checkpoint.
    """
    config = state["config"]
    identity = run_identity({**config, "seed": None})
    facts = {"identity": identity, **state.get("digests", {})}
    return {
        "teacher": f"{config['options']['model']}-{fingerprint(facts)[:6]}",
        "teacher.seed": str(config["seed"]),
        "teacher.epoch": str(state["epoch"] + 1),
    }


def read_teacher(config: DictConfig, reference: str) -> dict[str, Any]:
    """The checkpoint of a teacher, if it names nothing but parts that may be built.

    Raises:
        ConfigError: it does, or there is no such checkpoint.
    """
    from okddip.training import checkpoint

    path = find_checkpoint("method.teacher", reference, config.tracking.get("uri"))
    state = checkpoint.load(path)
    trust_of(config).check(state["config"], path)
    checkpoint.warn_of_other_version(state, path)
    return state


def check_teacher(config: DictConfig, state: dict[str, Any], dataset: Dataset) -> Backbone:
    """The trained network of a checkpoint, if it knows the classes of the data set.

    Images of another size are warned about: the network has learned from others, and may be asked of them.

    Raises:
        ConfigError: it was trained on other classes or channels or with another normalisation, cannot take
            images so small, or cannot be restored.
    """
    for what, theirs, ours in (
        ("classes", composed(state["classes"]), composed(dataset.classes)),
        ("image channels", state["channels"], dataset.channels),
    ):
        if theirs != ours:
            raise ConfigError(
                f"method.teacher={config.method.teacher}: was trained on {what} {theirs},"
                f" and dataset={config.options.dataset} has {ours}. Name a teacher trained on this data set."
            )
    for mean, std, learned_mean, learned_std in zip(
        dataset.mean, dataset.std, state["mean"], state["std"], strict=True
    ):
        # statistics of parts of one training set differ by less
        if max(abs(mean - learned_mean), abs(std - learned_std)) > 0.1 * learned_std:
            raise Incompatible(
                f"method.teacher={config.method.teacher}: learned from images normalised by mean"
                f" {rounded(state['mean'])} and std {rounded(state['std'])}, and"
                f" dataset={config.options.dataset} normalises by {rounded(dataset.mean)} and"
                f" {rounded(dataset.std)}: it would see other images than it knows."
                " Set dataset.mean and dataset.std to the teacher's."
            )
    if list(dataset.image_size) != state["image_size"]:
        log.warning(
            "method.teacher=%s: was trained on images of %dx%d, and those of dataset=%s have %dx%d.",
            *(config.method.teacher, *state["image_size"]),
            *(config.options.dataset, *dataset.image_size),
        )
    try:
        group, method = rebuild(state, trust_of(config), f"method.teacher={config.method.teacher}")
    except ConfigError as error:
        raise ConfigError(f"method.teacher={config.method.teacher}: {error}") from error
    teacher = group.extract(method.kept)
    if min(dataset.image_size) < teacher.minimum_size:
        raise Incompatible(
            f"method.teacher={config.method.teacher}: takes images of at least {teacher.minimum_size} pixels"
            f" a side, and those of dataset={config.options.dataset} have"
            f" {'x'.join(map(str, dataset.image_size))}. Name a teacher trained on such images."
        )
    return teacher


def rounded(numbers: Sequence[float]) -> str:
    return f"[{','.join(f'{number:.4g}' for number in numbers)}]"
