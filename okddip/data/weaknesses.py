"""Weaknesses of a data set's splits that make accuracies misleading."""

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from okddip.data.sources import Split

if TYPE_CHECKING:
    from okddip.data.dataset import Dataset


def weaknesses(dataset: "Dataset", *, overlap: bool = True) -> list[str]:
    """A sentence for each weakness of a data set's splits; a run is possible all the same.

    Args:
        dataset: a user's own may have no `splits`, and a streamed one keeps no images; checks that would have
            to read files are left out.
        overlap: also look for test and validation images that are training images too, which takes a third
            of a second for CIFAR-10.
    """
    splits = getattr(dataset, "splits", {})
    classes, name = dataset.classes, dataset.name
    if len(classes) == 1:
        return [f"dataset {name}: has 1 class, so every accuracy is 100 %."]
    found = []
    for split, part in splits.items():
        present = np.unique(np.asarray(part.labels))
        if len(present) == 1:
            found.append(
                f"dataset {name}: all {len(part.labels):,} {noun(split)} images are of 1 class of its"
                f" {len(classes):,} ('{classes[present[0]]}')."
            )
    known: set[bytes] = set()
    for split, part in splits.items() if overlap and "train" in splits else ():
        if split == "train" or not (isinstance(part, Split) and isinstance(splits["train"], Split)):
            continue
        known = known or set(words(splits["train"].images))
        if shared := sum(word in known for word in words(part.images)):
            found.append(
                f"dataset {name}: {shared:,} of the {len(part.labels):,} {noun(split)} images are training"
                " images too, pixel for pixel, so the accuracy there is partly memorised."
            )
    return found


def noun(split: str) -> str:
    return {"val": "validation", "train": "training"}.get(split, split)


def words(images: Tensor) -> Iterator[bytes]:
    """A digest of each of uint8 images [N, H, W, C]."""
    for chunk in images.split(4096):
        for pixels in chunk.flatten(1).numpy():
            yield hashlib.blake2b(pixels, digest_size=16).digest()
