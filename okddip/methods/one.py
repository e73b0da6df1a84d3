"""On-the-fly native ensemble (Lan et al., NeurIPS 2018; the authors' train_one.py)."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from okddip.errors import check_choice
from okddip.methods.base import Losses, Method, Ramp, at_least_single, with_ensemble
from okddip.methods.losses import check_soft_loss, hard_loss, log_softened, soft_loss
from okddip.models.group import GroupOutput


class ONE(Method):
    """hard + alpha * ramp * soft: branches imitate a teacher that a gate mixes out of their own logits.

    The gate looks at what the trunk gives: global average pool, linear, batch norm, ReLU, softmax over the
    peers. The teacher's logits learn from the labels too; that cross-entropy is part of the hard loss.
    """

    refused_structures: ClassVar[dict[str, str]] = {
        "network": "the gate of ONE looks at the output of a shared trunk, and networks share none."
        " Use method.structure=branch."
    }

    def __init__(
        self,
        *,
        temperature: float,
        alpha: float,
        ramp_epochs: float,
        ramp_start: float,
        loss: str,
        detach_targets: bool,
        **group: Any,
    ) -> None:
        """
        Args:
            temperature: T, softens the predictions of all.
            alpha: weight of the soft loss.
            ramp_epochs, ramp_start: see `Ramp`.
            loss: `kl` or `ce`, see `soft_loss`.
            detach_targets: send no gradient through the targets; the gate then learns from the labels alone.
            group: see `Method`.
        """
        super().__init__(**group)
        check_soft_loss(temperature, alpha, loss)
        check_choice("method.detach_targets", detach_targets, (True, False))
        self.temperature = temperature
        self.alpha = alpha
        self.ramp = Ramp(ramp_epochs, ramp_start, self.epochs)
        self.loss = loss
        self.detach_targets = detach_targets
        self.gate = nn.Sequential(nn.Linear(self.trunk_channels, self.peers), nn.BatchNorm1d(self.peers))

    @property
    def predictors(self) -> tuple[str, ...]:
        return (*super().predictors, "teacher")

    def losses(self, output: GroupOutput, labels: Tensor, ramp: Tensor) -> Losses:
        assert output.trunk is not None, "ONE needs a group of branches"
        scores = self.gate(at_least_single(output.trunk.mean((2, 3))))  # [B, P]
        weights = scores.relu().softmax(-1)  # [B, P]
        teacher = torch.einsum("bp,pbk->bk", weights, output.logits)[None]  # [1, B, K]
        hard = hard_loss(output.logits, labels) + hard_loss(teacher, labels)
        source = teacher.detach() if self.detach_targets else teacher
        targets = log_softened(source, self.temperature).expand_as(output.logits)  # [P, B, K]
        soft = soft_loss(output.logits, targets, self.temperature, self.loss)
        predictions = torch.cat([with_ensemble(output.logits, self.peers), teacher])
        return Losses(hard + self.alpha * ramp * soft, {"hard": hard, "soft": soft}, predictions)
