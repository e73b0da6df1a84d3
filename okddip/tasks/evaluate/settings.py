"""What an evaluation is done with: a checkpoint's configuration, and what the command sets instead."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from okddip.errors import ConfigError
from okddip.sweeps import teacher


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
    elif settings.method.get("teacher"):
        settings.method.teacher = find_teachers(settings)
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
    source = settings.dataset.get("source") or {}
    is_sized = "dataset.image_size" in chosen or source.get("image_size", 0) is not None
    if "dataset.root" in chosen and not is_sized:  # other images may be of several sizes
        settings.dataset.image_size = settings.dataset.source.image_size = state["image_size"]
    return settings


def find_teachers(settings: DictConfig) -> str | list[str]:
    """What `method.teacher` names, with the finished teacher in place of each `auto`; none is trained here.

    Raises:
        ConfigError: the store has no such run.
    """
    found = []
    for name, config in teacher.teacher_references(settings):
        place = name if config is None else teacher.finished_teacher(config)
        if place is None:
            raise ConfigError(
                "method.teacher=auto: the store that tracking names has no finished run of this checkpoint's"
                " teacher. Name its checkpoint: methods.teacher=PATH."
            )
        found.append(place)
    return found if OmegaConf.is_list(settings.method.teacher) else found[0]
