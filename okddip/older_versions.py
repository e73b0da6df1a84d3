"""What configurations of older versions lack or call otherwise: those in checkpoints, runs and stores."""

from collections.abc import Mapping
from typing import Any

# `_target_` then: now
MOVED = {
    "okddip.trainer.Trainer": "okddip.training.trainer.Trainer",
    "okddip.schedules.multistep": "okddip.training.schedules.multistep",
    "okddip.schedules.cosine": "okddip.training.schedules.cosine",
    "okddip.schedules.constant": "okddip.training.schedules.constant",
    "okddip.tasks.train": "okddip.tasks.train.train",
    "okddip.tracking.MLflow": "okddip.tracking.tracker.MLflow",
    "okddip.tracking.NoTracking": "okddip.tracking.tracker.NoTracking",
}
FIRST_NAMES = {now: then for then, now in MOVED.items()}

# Settings that came later, with the value that a run without them had. With it they identify no run.
LATER_SETTINGS: dict[str, dict[str, Any]] = {
    "trainer": {"deterministic": False, "drop_last": False, "threads": None},
    "method": {"views": "shared", "ema_decay": None},
    "model": {"peers": None},
}


# The number of a run's first epoch wherever people look: a key of checkpoints and of `run.json`, and a tag.
FIRST_EPOCH = "first_epoch"


def first_epoch(known: Mapping[str, Any]) -> int:
    """The number of the first epoch of a run: 1; 0 in a run that an older version began, which says nothing.

    Args:
        known: a checkpoint, the content of `run.json`, or the tags of an MLflow run.
    """
    return int(str(known.get(FIRST_EPOCH)) == "1")


def updated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A plain configuration of this version or an older one, as this version writes it."""
    current = with_current_names(config)
    for group, settings in LATER_SETTINGS.items():
        if isinstance(current.get(group), dict) and (group != "method" or is_ours(current[group])):
            current[group] = settings | current[group]
    return current


def is_ours(part: Mapping[str, Any]) -> bool:
    """Whether a part is of this program: another's may not take what came later."""
    return str(part.get("_target_", "")).startswith("okddip.")


def with_current_names(config: Any) -> Any:
    """A copy of a plain configuration in which each `_target_` has the name of today."""
    if isinstance(config, Mapping):
        return {
            key: MOVED.get(value, value)
            if key == "_target_" and isinstance(value, str)
            else with_current_names(value)
            for key, value in config.items()
        }
    if isinstance(config, list):
        return [with_current_names(item) for item in config]
    return config


def first_name(target: str) -> str:
    """The first name that a part had: what identifies a run must not change when its parts move."""
    return FIRST_NAMES.get(target, target)
