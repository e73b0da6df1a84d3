"""What the runs of a row cost, and whose accuracy they report."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from okddip.run.cost import FLOPS, KEPT, PREDICTOR, TRAINED
from okddip.tasks.report.intervals import ROUNDING_ERROR
from okddip.tasks.report.runs import tag

if TYPE_CHECKING:
    from mlflow.entities import Run

SPEED = "train/images_per_second"
# what primary predictors are called where people read; of a run of an older version the first that fits
PREDICTORS = {
    "student": "student",
    "leader": "leader",
    "ema/mean": "mean averaged peer",
    "mean": "mean peer",
    "ensemble": "ensemble",
}


class Cost(NamedTuple):
    """None: the runs do not say."""

    trained: int | None  # parameters of all peers and of the method
    images_per_second: float | None  # of training: median over runs of that of their last epochs
    kept: int | None  # parameters of what has the accuracy: a network, or an ensemble of all
    flops: int | None  # of its forward pass for one image

    @property
    def training(self) -> str:
        speed = "" if self.images_per_second is None else f"{self.images_per_second:,.0f} images/s"
        return ", ".join(filter(None, (short(self.trained).strip(), speed)))

    @property
    def inference(self) -> str:
        flops = "" if self.flops is None else f"{short(self.flops)}FLOPs"
        return ", ".join(filter(None, (short(self.kept).strip(), flops)))


def cost_of(members: Sequence["Run"]) -> Cost:
    """What the runs of one row, which have the same settings, cost."""
    speeds = pd.Series([run.data.metrics.get(SPEED) for run in members], dtype=float)
    return Cost(
        whole_number(members, TRAINED),
        None if speeds.isna().all() else float(speeds.median()),
        whole_number(members, KEPT),
        whole_number(members, FLOPS),
    )


def whole_number(members: Sequence["Run"], name: str) -> int | None:
    """The number in a tag of the newest run that has it; anybody may have written it."""
    texts = [tag(run, name) or "" for run in members]
    numbers = [int(text) for text in texts if text.isascii() and text.isdecimal() and len(text) < 19]
    return numbers[-1] if numbers else None


def predictor_of(members: Sequence["Run"]) -> str:
    """Whose accuracy runs of one row report, in words: by their tags, and of older runs by their metrics."""
    for run in members:
        if name := tag(run, PREDICTOR):
            return PREDICTORS.get(name, name)
    if members[0].data.params.get("method.peers") == "1":
        return PREDICTORS["student"]
    metrics = [run.data.metrics for run in members]
    for name, words in PREDICTORS.items():
        gaps = [abs(own.get(f"test/{name}/top1", math.inf) - own["final/top1"]) for own in metrics]
        if max(gaps) < ROUNDING_ERROR:
            return words
    return ""


def short(number: int | None) -> str:
    """Three digits and a unit: 1.53 M."""
    if number is None:
        return ""
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            scaled = number / 10**power
            return f"{scaled:.{2 - min(2, len(str(int(scaled))) - 1)}f} {unit}"
    return f"{number} "
