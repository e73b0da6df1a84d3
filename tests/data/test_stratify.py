"""Stratified parts."""

import numpy as np
import pytest

from okddip.data.stratify import hold_out, stratified_order
from okddip.errors import ConfigError

LABELS = np.repeat([0, 1, 2], [600, 300, 100])
CLASSES = ("a", "b", "c")


@pytest.mark.parametrize("size", [10, 50, 333, 1000])
def test_every_prefix_is_stratified(size: int) -> None:
    order = stratified_order(LABELS)
    assert sorted(order) == list(range(1000))
    counts = np.bincount(LABELS[order[:size]], minlength=3)
    assert np.abs(counts - size * np.array([0.6, 0.3, 0.1])).max() <= 1


def test_images_are_drawn_at_random_within_a_class() -> None:
    first = stratified_order(LABELS)[:100]
    ones = first[LABELS[first] == 0]
    assert ones.min() < 100
    assert ones.max() > 500


def test_smaller_training_sets_are_parts_of_larger_ones() -> None:
    small, _ = hold_out(LABELS, CLASSES, 0, 100)
    large, _ = hold_out(LABELS, CLASSES, 0, 500)
    assert set(small) < set(large)
    assert len(small) == 100


def test_validation_images_are_apart_and_the_same_for_every_training_size() -> None:
    train, val = hold_out(LABELS, CLASSES, 0.1, None)
    assert len(val) == 100
    assert sorted([*train, *val]) == list(range(1000))
    smaller, val_again = hold_out(LABELS, CLASSES, 0.1, 200)
    assert np.array_equal(val, val_again)
    assert not set(smaller) & set(val)


def test_without_options_the_training_set_is_whole_and_in_order() -> None:
    train, val = hold_out(LABELS, CLASSES, 0, None)
    assert np.array_equal(train, np.arange(1000))
    assert len(val) == 0


@pytest.mark.parametrize(
    ("validation", "train_size", "message"),
    [
        (0, 1001, "train_size=1001: the training set has 1000 images; give at most"),
        (0.5, 501, "train_size=501: the training set has 500 images outside the 500 validation images"),
        (0, 2, "class 'c' would have no training image"),
        (0.001, None, r"validation=0.001: class 'b' would have no validation image \(it has 300 in all\)"),
    ],
)
def test_impossible_parts_are_refused(validation: float, train_size: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hold_out(LABELS, CLASSES, validation, train_size)


def test_a_class_with_one_image_cannot_be_validated_on() -> None:
    labels = np.array([0] * 20 + [1])
    train, _ = hold_out(labels, ("many", "one"), 0, None)
    assert len(train) == 21
    with pytest.raises(ConfigError, match="class 'one' would have no validation image"):
        hold_out(labels, ("many", "one"), 0.1, None)


def test_all_classes_that_a_part_would_lack_are_named_at_once() -> None:
    labels = np.array([0] * 96 + [1, 1, 2, 2])
    with pytest.raises(ConfigError, match="2 things are wrong") as refusal:
        hold_out(labels, ["cat", "dog", "emu"], 0.02, None)
    assert "class 'dog' would have no validation image" in str(refusal.value)
    assert "class 'emu' would have no validation image" in str(refusal.value)
