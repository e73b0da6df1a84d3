"""A configuration as MLflow's params, and what MLflow takes in one request."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from okddip.tracking.outbox import CONTEXT

if TYPE_CHECKING:  # importing MLflow takes more than a second, and `okddip --help` has no use for it
    import mlflow

RESUMED = "resumed."  # begins the tags of params that are others than when the run began
# limits of MLflow's requests
MAX_KEY_LENGTH, MAX_PARAM_LENGTH, MAX_TAG_LENGTH, MAX_DIGEST_LENGTH = 250, 6000, 8000, 36
MAX_PARAMS, MAX_TAGS, MAX_METRICS = 100, 100, 1000
EXACT = 2.0**53  # up to here a float holds every whole number


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """A nested configuration as MLflow params: named like overrides, values written like overrides.

    >>> flatten({"method": {"peers": 4, "teacher": None}, "milestones": [0.5, 0.75]})
    {'method.peers': '4', 'method.teacher': 'null', 'milestones': '[0.5,0.75]'}
    """
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update({_key(f"{key}.{inner}"): text for inner, text in flatten(value).items()})
        else:
            text = _override(value)
            flat[_key(key)] = text if len(text) <= MAX_PARAM_LENGTH else text[: MAX_PARAM_LENGTH - 3] + "..."
    return flat


def _override(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_override(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_override, value)) + "]"
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        return str(int(value))  # `3` and `3.0` are one setting
    return str(value)


def params_of(run: "mlflow.entities.Run") -> dict[str, str]:
    """The flattened configuration of a run, as of the last time that it was resumed."""
    resumed = {
        key.removeprefix(RESUMED): value for key, value in run.data.tags.items() if key.startswith(RESUMED)
    }
    return {**run.data.params, **resumed}


def digests_of(run: "mlflow.entities.Run") -> dict[str, str]:
    """Of the images that a run of the store works on, split by split; empty if it did not get so far."""
    return {
        tag.value: used.dataset.digest
        for used in (run.inputs.dataset_inputs if run.inputs else [])
        for tag in used.tags
        if tag.key == CONTEXT
    }


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {_key(key): str(value)[:MAX_TAG_LENGTH] for key, value in tags.items()}


def _key(name: str) -> str:
    return re.sub(r"[^\w\-./: ]", "_", str(name))[:MAX_KEY_LENGTH]


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _importance(metric: str) -> tuple[int, int, bool]:
    """What a reader asks for first: results before training, the primary predictor before the others."""
    split, _, rest = metric.partition("/")
    known = ("final", "best", "test", "val", "train")
    return known.index(split) if split in known else len(known), rest.count("/"), rest != "top1"
