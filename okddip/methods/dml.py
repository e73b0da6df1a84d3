"""Deep mutual learning (Zhang et al., CVPR 2018; the authors' train_DML.py)."""

from typing import Any

import torch
from torch import Tensor

from okddip.errors import check_choice
from okddip.methods.base import Losses, Method, with_ensemble
from okddip.methods.losses import check_soft_loss, hard_loss, log_softened, mean_of_others, soft_loss
from okddip.models.group import GroupOutput


class DML(Method):
    """hard + soft, without a weight or a ramp: each peer imitates all the others."""

    others: Tensor  # [P - 1, P], row by row each peer's 1st, 2nd, ... other

    def __init__(
        self, *, target: str, temperature: float, loss: str, detach_targets: bool, **group: Any
    ) -> None:
        """
        Args:
            target: `ensemble`, the mean of the others' logits (the authors' default), or `pairwise`, each of
                the others in turn; the mean of these losses.
            temperature: T, softens the predictions of all.
            loss: `kl` or `ce`, see `soft_loss`.
            detach_targets: send no gradient through the targets, as in the DML paper; the authors send it.
            group: see `Method`.
        """
        super().__init__(**group)
        check_soft_loss(temperature, 1.0, loss)
        check_choice("method.target", target, ("ensemble", "pairwise"))
        check_choice("method.detach_targets", detach_targets, (True, False))
        self.target = target
        self.temperature = temperature
        self.loss = loss
        self.detach_targets = detach_targets
        shifts = torch.arange(1, self.peers)[:, None] + torch.arange(self.peers)
        self.register_buffer("others", shifts % self.peers, persistent=False)

    def losses(self, output: GroupOutput, labels: Tensor, ramp: Tensor) -> Losses:
        hard = hard_loss(output.logits, labels)
        sources = output.logits.detach() if self.detach_targets else output.logits
        if self.target == "ensemble":
            targets = log_softened(mean_of_others(sources), self.temperature)  # [P, B, K]
            soft = soft_loss(output.logits, targets, self.temperature, self.loss)
        else:
            targets = log_softened(sources, self.temperature)[self.others]  # [P - 1, P, B, K]
            learners = output.logits.expand_as(targets)
            soft = soft_loss(learners, targets, self.temperature, self.loss) / (self.peers - 1)
        return Losses(hard + soft, {"hard": hard, "soft": soft}, with_ensemble(output.logits, self.peers))
