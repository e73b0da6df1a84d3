"""What an evaluation is done with: a checkpoint's configuration, and what the command sets instead."""

import logging
from typing import Any

from omegaconf import DictConfig, OmegaConf

from okddip.errors import ConfigError
from okddip.run.parts import Parts
from okddip.sweeps import teacher
from okddip.text import composed

log = logging.getLogger(__name__)


def evaluation_settings(config: DictConfig, chosen: set[str], state: dict[str, Any]) -> DictConfig:
    """The configuration of a checkpoint with the data set, trainer, tracking and teacher of the command line.

    Args:
        chosen: keys and groups that the command line sets.

    Raises:
        ConfigError: the teacher cannot be found.
    """
    settings = OmegaConf.create(state["config"])
    settings.tracking, settings.trust = config.tracking, config.trust
    for section in (settings.dataset, settings.dataset.get("source")):
        if section and "cache_dir" in section:  # a folder of this machine, whatever the checkpoint says
            section.cache_dir = config.dataset.cache_dir
    if "methods.teacher" in chosen:
        settings.method.teacher = config.methods.teacher
    elif settings.method.get("teacher") == "auto":
        settings.method.teacher = find_teacher(settings)
    if "dataset" in chosen:
        settings.dataset = config.dataset
        settings.options.dataset = config.options.dataset
        if config.dataset.image_size is None and "dataset.image_size" not in chosen:
            chosen.add("dataset.image_size")
            config.dataset.image_size = state["image_size"]
        source = config.dataset.get("source") or {}
        if settings.method.get("teacher") and source.get("channels", state["channels"]) == state["channels"]:
            # already now, as `build` refuses a teacher that was trained on images normalised otherwise
            settings.dataset.mean, settings.dataset.std = state["mean"], state["std"]
    for key in chosen:
        group, _, name = key.partition(".")
        if group in ("dataset", "trainer") and name:
            value = OmegaConf.select(config, key)
            OmegaConf.update(settings, key, value, force_add=True)
            # the source follows by ${dataset.root} and the like, which are resolved in a checkpoint
            if group == "dataset" and name in settings.dataset.get("source", {}):
                settings.dataset.source[name] = value
    settings.trainer.compile = False  # nothing is compiled here, and no compiler is needed
    return settings


def find_teacher(settings: DictConfig) -> str:
    """The finished teacher that `method.teacher=auto` names; none is trained here.

    Raises:
        ConfigError: the store has no such run.
    """
    found = teacher.finished_teacher(teacher.teacher_config(settings))
    if found is None:
        raise ConfigError(
            "method.teacher=auto: the store that tracking names has no finished run of this checkpoint's"
            " teacher. Name its checkpoint: methods.teacher=PATH."
        )
    return found


def check_images(settings: DictConfig, state: dict[str, Any], parts: Parts) -> None:
    """Refuse a data set whose classes or channels are not those of the checkpoint.

    Raises:
        ConfigError: names both.
    """
    for what, theirs, ours in (
        ("classes", composed(state["classes"]), composed(parts.dataset.classes)),
        ("image channels", state["channels"], parts.dataset.channels),
    ):
        if theirs != ours:
            raise ConfigError(
                f"dataset={settings.options.dataset}: has {what} {ours}, and the checkpoint was trained on"
                f" dataset={state['config']['options']['dataset']} with {what} {theirs}."
                " Choose a data set with the same ones, or leave dataset out for the checkpoint's own."
            )
    if list(parts.dataset.image_size) != state["image_size"]:
        log.warning(
            "The network was trained on images of %dx%d and is measured on images of %dx%d.",
            *state["image_size"],
            *parts.dataset.image_size,
        )
