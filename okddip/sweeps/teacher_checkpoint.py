"""The checkpoint of a teacher: read, described in tags, and checked against the student's images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig

from okddip.deployment.predictors import extract, rebuild
from okddip.errors import ConfigError, Incompatible
from okddip.run.identity import fingerprint, run_identity
from okddip.run.references import find_checkpoint
from okddip.text import composed, listed
from okddip.training import checkpoint
from okddip.trust import trust_of

if TYPE_CHECKING:
    from okddip.data.dataset import Dataset
    from okddip.models.backbone import Backbone

log = logging.getLogger(__name__)

# share of a standard deviation; statistics of parts of one training set differ by less
NORMALISATION_TOLERANCE = 0.1


def read_teacher(config: DictConfig, reference: str) -> dict[str, Any]:
    """Load the checkpoint of a teacher, if it names nothing but parts that may be built.

    Args:
        config: of the student's run.
        reference: of the checkpoint: a path or `runs:/ID`.

    Raises:
        ConfigError: it names others, or there is no such checkpoint.
    """
    path = find_checkpoint("method.teacher", reference, config.tracking.get("uri"))
    state = checkpoint.load(path)
    trust_of(config).check(state["config"], path)
    checkpoint.warn_of_other_version(state, path)
    return state


def describe_teachers(states: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Tags that say which teachers checkpoints hold, wherever they lie; those of several joined by ` & `.

    `teacher` is the same for every seed: the model, and a short hash of its settings and images;
    `teacher.seed` and `teacher.epoch` say which of them it is.
    """
    every = [describe_teacher(state) for state in states]
    return {name: " & ".join(tags[name] for tags in every) for name in (every[0] if every else ())}


def describe_teacher(state: dict[str, Any]) -> dict[str, str]:
    """See `describe_teachers`."""
    config = state["config"]
    identity = run_identity({**config, "seed": None})
    facts = {"identity": identity, **state.get("digests", {})}
    return {
        "teacher": f"{config['options']['model']}-{fingerprint(facts)[:6]}",
        "teacher.seed": str(config["seed"]),
        "teacher.epoch": str(state["epoch"] + 1),
    }


def check_teacher(config: DictConfig, reference: str, state: dict[str, Any], dataset: Dataset) -> Backbone:
    """The trained network of a checkpoint, if it can teach on these images.

    Images of another size are warned about only.

    Args:
        config: of the student's run.
        reference: what `method.teacher` has for it, for messages.
        state: the checkpoint of the teacher.
        dataset: of the student.

    Raises:
        ConfigError: the network was trained on other classes or channels or with another normalisation,
            cannot take images so small, or cannot be restored.
    """
    teacher, images = f"method.teacher={reference}", f"dataset={config.options.dataset}"
    size = "x".join(map(str, dataset.image_size))
    theirs, ours = composed(state["classes"]), composed(dataset.classes)
    for what, is_same, learned, found in (
        ("classes", theirs == ours, listed(theirs), listed(ours)),
        ("image channels", state["channels"] == dataset.channels, state["channels"], dataset.channels),
    ):
        if not is_same:
            raise ConfigError(
                f"{teacher}: was trained on {what} {learned}, and {images} has {found}."
                " Name a teacher trained on this data set."
            )
    if not is_same_normalisation(state, dataset):
        raise Incompatible(
            f"{teacher}: learned from images normalised by mean {rounded(state['mean'])} and std"
            f" {rounded(state['std'])}, and {images} normalises by {rounded(dataset.mean)} and"
            f" {rounded(dataset.std)}. Set dataset.mean and dataset.std to the teacher's."
        )
    if list(dataset.image_size) != state["image_size"]:
        learned = "x".join(map(str, state["image_size"]))
        log.warning(
            "%s: was trained on images of %s, and those of %s have %s.", teacher, learned, images, size
        )
    try:
        group, method = rebuild(state, trust_of(config), teacher)
    except ConfigError as error:
        raise ConfigError(f"{teacher}: {error}") from error
    kept = method.averaged if method.primary == "ema/mean" else method.predictors
    network = cast("Backbone", extract(group, method, kept[method.kept]))
    if min(dataset.image_size) < network.minimum_size:
        raise Incompatible(
            f"{teacher}: takes images of at least {network.minimum_size} pixels a side, and those of {images}"
            f" have {size}. Name a teacher trained on such images."
        )
    return network


def is_same_normalisation(state: dict[str, Any], dataset: Dataset) -> bool:
    """Whether a teacher and a data set normalise images by about the same mean and std."""
    statistics = zip(dataset.mean, dataset.std, state["mean"], state["std"], strict=True)
    return all(
        max(abs(mean - learned_mean), abs(std - learned_std)) <= NORMALISATION_TOLERANCE * learned_std
        for mean, std, learned_mean, learned_std in statistics
    )


def rounded(numbers: Sequence[float]) -> str:
    return f"[{','.join(f'{number:.4g}' for number in numbers)}]"
