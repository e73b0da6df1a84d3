"""What lets a data set's accuracies say less than they seem to."""

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from okddip.data.sources import Split

if TYPE_CHECKING:
    from okddip.data.dataset import Dataset


def weaknesses(dataset: "Dataset", *, overlap: bool = True) -> list[str]:
    """Sentences on what is wrong with a data set's splits, though a run can be done with it.

    Args:
        dataset: one of a user's own may keep no `splits`, and a streamed one keeps no images: what cannot be
            seen without reading files is not looked for.
        overlap: look for test and validation images that are training images too. That takes about as long
            as the digests of the splits: a third of a second for CIFAR-10.
    """
    splits = getattr(dataset, "splits", {})
    classes, name = dataset.classes, dataset.name
    if len(classes) == 1:
        return [f"dataset {name}: has 1 class, so every accuracy is 100 %, whatever is learned."]
    found = []
    for split, part in splits.items():
        present = np.unique(np.asarray(part.labels))
        if len(present) == 1:
            found.append(
                f"dataset {name}: all {len(part.labels):,} {noun(split)} images are of 1 class of its"
                f" {len(classes):,} ('{classes[present[0]]}')."
            )
    known: set[bytes] = set()
    for split, part in splits.items() if overlap else ():
        if split == "train" or not (isinstance(part, Split) and isinstance(splits["train"], Split)):
            continue
        known = known or set(words(splits["train"].images))
        if shared := sum(word in known for word in words(part.images)):
            found.append(
                f"dataset {name}: {shared:,} of the {len(part.labels):,} {noun(split)} images are training"
                " images too, pixel for pixel, so the accuracy there is partly learned by heart."
            )
    return found


def noun(split: str) -> str:
    return {"val": "validation", "train": "training"}.get(split, split)


def words(images: Tensor) -> Iterator[bytes]:
    """A digest of each of uint8 images [N, H, W, C]."""
    for chunk in images.split(4096):
        for pixels in chunk.flatten(1).numpy():
            yield hashlib.blake2b(pixels, digest_size=16).digest()
