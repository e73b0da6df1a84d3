"""The attention of a run by epoch, in a file: as metrics its entries would bury the others in MLflow.

In `metrics.jsonl` they are `test/attention/0/1`, what peer 0 pays to peer 1.
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from okddip.run.folder import Epoch

ENTRY = re.compile(r"(\w+)/attention/(\d+)/(\d+)")
FILE = "attention.csv"
COLUMNS = ("epoch", "split", "asks", "is_asked", "weight")  # epochs count from 1
TAG = "attention"  # of a run that has the file: how many auxiliary peers ask, and are asked, `3x3`


def write_attention(finished: Sequence[Epoch], folder: Path) -> dict[int, np.ndarray]:
    """Write the attention of a run into `attention.csv`, if there is any.

    Args:
        finished: the run's epochs, counted from 1.
        folder: of the run.

    Returns:
        That of the test images by epoch, counted from 1: [A asks, A is asked].
    """
    rows = [
        (epoch, match[1], int(match[2]), int(match[3]), value)
        for epoch, _, results in finished
        for name, value in results.items()
        if (match := ENTRY.fullmatch(name))
    ]
    if not rows:
        return {}
    with (folder / FILE).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    matrices: dict[int, np.ndarray] = {}
    for epoch, split, asks, is_asked, value in rows:
        if split == "test":
            size = 1 + max(row[2] for row in rows)
            matrices.setdefault(epoch, np.zeros((size, size)))[asks, is_asked] = value
    return matrices
