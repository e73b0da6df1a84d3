"""Fixed stratified parts of a training set."""

from collections.abc import Sequence

import numpy as np

from okddip.errors import ConfigError, raise_problems
from okddip.text import for_terminal


def stratified_order(labels: np.ndarray) -> np.ndarray:
    """Order all indices so that every prefix holds each class in proportion, as nearly as possible.

    The order is random within a class but fixed: it does not depend on the run's seed. Prefixes are nested:
    the first 1,000 images are among the first 5,000.

    Args:
        labels: integers [N].

    Returns:
        Indices [N].
    """
    rng = np.random.default_rng(0)
    position = np.empty(len(labels))
    _, counts = np.unique(labels, return_counts=True)
    by_class = np.argsort(labels, kind="stable")
    for members in np.split(by_class, np.cumsum(counts)[:-1]):
        members = rng.permutation(members)
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.argsort(position, kind="stable")


def hold_out(
    labels: np.ndarray, classes: Sequence[str], validation: float, train_size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training images in use and of the validation images, both ascending.

    The validation images are taken first: they are the same for every `train_size`.

    Args:
        labels: of the whole training set, [N].
        classes: their names.
        validation: share of the training set to hold out, 0 for none.
        train_size: how many of the other images to keep, None for all.

    Raises:
        ConfigError: `train_size` is larger than the training set, or a part would lack a class.
    """
    order = stratified_order(labels)
    held = round(validation * len(labels))
    val, train = np.sort(order[:held]), order[held:]
    if train_size is not None and train_size > len(train):
        rest = f" outside the {held} validation images" if held else ""
        raise ConfigError(
            f"dataset.train_size={train_size}: the training set has {len(train)} images{rest}; "
            f"give at most that, or null for all."
        )
    train = np.sort(train[:train_size])
    for part, indices, key in (
        ("validation", val, f"dataset.validation={validation}"),
        ("training", train, f"dataset.train_size={train_size}, dataset.validation={validation}"),
    ):
        absent = set(range(len(classes))) - set(np.unique(labels[indices]).tolist())
        if part == "training" or validation > 0:
            raise_problems(
                key,
                [
                    f"{key}: class '{for_terminal(classes[label])}' would have no {part} image "
                    f"(it has {int((labels == label).sum())} in all); give a larger value."
                    for label in sorted(absent)
                ],
            )
    return train, val
