"""Online knowledge distillation via collaborative learning (Guo et al., CVPR 2020)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from okddip.errors import check_choice
from okddip.methods.base import Distillation, Losses, with_ensemble
from okddip.methods.losses import hard_loss
from okddip.outputs import GroupOutput


class KDCL(Distillation):
    """hard + alpha * ramp * soft: all peers imitate one target, made of all their logits and the labels."""

    def __init__(self, *, target: str, **settings: Any) -> None:
        """
        Args:
            target: `minlogit`, `naive` or `mean`, see `target_logits`.
            settings: see `Distillation`.
        """
        super().__init__(**settings)
        check_choice("method.target", target, ("minlogit", "naive", "mean"))
        self.target = target

    def target_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What the peers imitate, [P, B, K] and [B] to [B, K].

        `minlogit`: for each class the lowest logit among the peers, counted from the label's (paper, equation
        8), so that the target is at least as sure of the label as the surest peer; `naive`: the logits of the
        peer with the lowest cross-entropy, sample by sample; `mean`: the mean.
        """
        peers, batch, classes = logits.shape
        if self.target == "mean":
            return logits.mean(0)
        if self.target == "minlogit":
            of_label = logits.gather(2, labels.expand(peers, batch)[..., None])  # [P, B, 1]
            return (logits - of_label).amin(0)
        every = labels.expand(peers, batch)  # [P, B]
        cost = F.cross_entropy(logits.transpose(1, 2), every, reduction="none")  # [P, B]
        best = cost.argmin(0)[None, :, None]  # [1, B, 1]
        return logits.gather(0, best.expand(1, batch, classes))[0]

    def losses(self, output: GroupOutput, labels: Tensor, ramp: Tensor) -> Losses:
        hard = hard_loss(output.logits, labels)
        target = self.target_logits(self.sources(output.logits), labels)
        soft = self.soft_loss(output.logits, self.soften(target).expand_as(output.logits))
        total = self.weighted(hard, soft, ramp)
        return Losses(total, {"hard": hard, "soft": soft}, with_ensemble(output.logits, self.peers))
