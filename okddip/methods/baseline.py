"""One student that learns from the labels alone (the authors' train.py)."""

from typing import Any

from torch import Tensor

from okddip.methods.base import Losses, Method
from okddip.methods.losses import hard_loss
from okddip.outputs import GroupOutput


class Baseline(Method):
    """The plain network; the loss is its cross-entropy."""

    fewest_peers = 1
    most_peers = 1

    def __init__(self, **group: Any) -> None:
        """Args: see `Method`."""
        super().__init__(**group)
        self.primary = "student"

    @property
    def predictors(self) -> tuple[str, ...]:
        return ("student",)

    def losses(self, output: GroupOutput, labels: Tensor, ramp: Tensor) -> Losses:
        hard = hard_loss(output.logits, labels)
        return Losses(hard, {"hard": hard}, output.logits)
