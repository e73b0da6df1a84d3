"""Deep mutual learning (Zhang et al., CVPR 2018; the authors' train_DML.py)."""

from typing import Any

import torch
from torch import Tensor

from okddip.errors import check_choice
from okddip.methods.base import Distillation, Losses, with_ensemble
from okddip.methods.losses import hard_loss, mean_of_others
from okddip.outputs import GroupOutput


class DML(Distillation):
    """hard + soft, without a ramp: each peer imitates all the others.

    In the DML paper no gradient flows through the targets; the authors of OKDDip send it.
    """

    others: Tensor  # [P - 1, P], row by row each peer's 1st, 2nd, ... other

    def __init__(self, *, target: str, **settings: Any) -> None:
        """
        Args:
            target: `ensemble`, the mean of the others' logits (the authors' default), or `pairwise`, each of
                the others in turn; the mean of these losses.
            settings: see `Distillation`.
        """
        super().__init__(**settings)
        check_choice("method.target", target, ("ensemble", "pairwise"))
        self.target = target
        shifts = torch.arange(1, self.peers)[:, None] + torch.arange(self.peers)
        self.register_buffer("others", shifts % self.peers, persistent=False)

    def losses(self, output: GroupOutput, labels: Tensor, ramp: Tensor) -> Losses:
        hard = hard_loss(output.logits, labels)
        sources = self.sources(output.logits)
        if self.target == "ensemble":
            soft = self.soft_loss(output.logits, self.soften(mean_of_others(sources)))
        else:
            targets = self.soften(sources)[self.others]  # [P - 1, P, B, K]
            soft = self.soft_loss(output.logits.expand_as(targets), targets) / (self.peers - 1)
        total = self.weighted(hard, soft, ramp)
        return Losses(total, {"hard": hard, "soft": soft}, with_ensemble(output.logits, self.peers))
