"""On-the-fly native ensemble (Lan et al., NeurIPS 2018; the authors' train_one.py)."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from okddip.methods.base import Distillation, Losses, at_least_single, with_ensemble
from okddip.methods.losses import hard_loss
from okddip.outputs import GroupOutput


class ONE(Distillation):
    """hard + alpha * ramp * soft: branches imitate a teacher that a gate mixes out of their own logits.

    The gate looks at what the trunk gives: global average pool, linear, batch norm, ReLU, softmax over the
    peers. The teacher's logits learn from the labels too; that cross-entropy is part of the hard loss. With
    `detach_targets` the gate learns from the labels alone.
    """

    combination: str | None = "teacher"
    refused_structures: ClassVar[dict[str, str]] = {
        "network": "the gate of ONE looks at the output of a shared trunk, and networks share none."
        " Use method.structure=branch."
    }

    def __init__(self, **settings: Any) -> None:
        """Args: see `Distillation`."""
        super().__init__(**settings)
        self.gate = nn.Sequential(nn.Linear(self.trunk_channels, self.peers), nn.BatchNorm1d(self.peers))

    @property
    def predictors(self) -> tuple[str, ...]:
        return (*super().predictors, "teacher")

    def combine(self, output: GroupOutput) -> Tensor:
        assert output.trunk is not None, "ONE needs a group of branches"
        scores = self.gate(at_least_single(output.trunk.mean((2, 3))))  # [B, P]
        weights = scores.relu().softmax(-1)  # [B, P]
        return torch.einsum("bp,pbk->bk", weights, output.logits)

    def losses(self, output: GroupOutput, labels: Tensor, ramp: Tensor) -> Losses:
        teacher = self.combine(output)[None]  # [1, B, K]
        hard = hard_loss(output.logits, labels) + hard_loss(teacher, labels)
        targets = self.soften(self.sources(teacher)).expand_as(output.logits)  # [P, B, K]
        soft = self.soft_loss(output.logits, targets)
        predictions = torch.cat([with_ensemble(output.logits, self.peers), teacher])
        return Losses(self.weighted(hard, soft, ramp), {"hard": hard, "soft": soft}, predictions)
