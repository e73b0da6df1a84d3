"""A configuration as MLflow's params, tags as MLflow takes them, and both read from a run."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing MLflow takes more than a second, and `okddip --help` has no use for it
    from mlflow.entities import Run

RESUMED = "resumed."  # begins the tags of params that are others than when the run began
CONTEXT = "mlflow.data.context"  # the tag of a data set that says what it is for
MAX_KEY_LENGTH, MAX_PARAM_LENGTH, MAX_TAG_LENGTH = 250, 6000, 8000  # that MLflow takes
EXACT = 2.0**53  # up to here a float holds every whole number


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """A nested configuration as MLflow params: named like overrides, values written like overrides.

    >>> flatten({"method": {"peers": 4, "teacher": None}, "milestones": [0.5, 0.75]})
    {'method.peers': '4', 'method.teacher': 'null', 'milestones': '[0.5,0.75]'}
    """
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update({valid_key(f"{key}.{inner}"): text for inner, text in flatten(value).items()})
        else:
            text = as_param(value)
            if len(text) > MAX_PARAM_LENGTH:
                text = text[: MAX_PARAM_LENGTH - 3] + "..."
            flat[valid_key(key)] = text
    return flat


def as_param(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{as_param(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(as_param, value)) + "]"
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        return str(int(value))  # `3` and `3.0` are one setting
    return str(value)


def valid_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """Tags with the characters and lengths that MLflow takes."""
    return {valid_key(key): str(value)[:MAX_TAG_LENGTH] for key, value in tags.items()}


def valid_key(name: str) -> str:
    return re.sub(r"[^\w\-./: ]", "_", str(name))[:MAX_KEY_LENGTH]


def params_of(run: "Run") -> dict[str, str]:
    """The flattened configuration of a run, as of the last time that it was resumed."""
    resumed = {
        key.removeprefix(RESUMED): value for key, value in run.data.tags.items() if key.startswith(RESUMED)
    }
    return {**run.data.params, **resumed}


def digests_of(run: "Run") -> dict[str, str]:
    """Digests of the images that a run works on, by split; empty if it stopped before they were logged."""
    return {
        tag.value: used.dataset.digest
        for used in (run.inputs.dataset_inputs if run.inputs else [])
        for tag in used.tags
        if tag.key == CONTEXT
    }
