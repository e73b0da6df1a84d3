"""Test images without training images, for a network that was trained on others of the same classes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from okddip.data.folder import Listing, scan
from okddip.errors import ConfigError
from okddip.text import composed, listed

WHOLE = "."  # the split of a folder that is not split


def evaluation_folder(root: Path, split: str) -> Path:
    """Where the folders of the classes are: in root/SPLIT, or in `root` itself if that is not split."""
    return root / split if (root / split).is_dir() or (root / "train").is_dir() else root


def scan_evaluation(folder: Path, classes: Sequence[str]) -> Listing:
    """List folder/CLASS/*, see `okddip.data.folder.scan`.

    Args:
        classes: of the network. The folders may be some of them.

    Returns:
        The listing of the split `WHOLE`; its labels count in `classes`.

    Raises:
        ConfigError: see `scan`; or a folder is none of the classes.
    """
    listing = scan(folder, (WHOLE,))
    labels = class_indices(listing.classes, classes, str(folder))[listing.labels[WHOLE]]
    return listing._replace(classes=tuple(classes), labels={WHOLE: labels})


def class_indices(found: Sequence[str], classes: Sequence[str], where: str) -> np.ndarray:
    """Where each class of some images stands among those of a network, by name.

    Args:
        where: the images are, for the message.

    Returns:
        int64 [len(found)].

    Raises:
        ConfigError: names those that the network does not know.
    """
    index = {name: number for number, name in enumerate(composed(classes))}
    names = composed(found)
    if unknown := [name for name in names if name not in index]:
        raise ConfigError(
            f"{where}: has classes that the checkpoint does not know: {listed(unknown)}. It was trained on"
            f" {listed(classes)}. Rename or remove them, or leave dataset out for the checkpoint's own"
            " images."
        )
    return np.array([index[name] for name in names], dtype=np.int64)
