"""Collaborative learning with intermediate-level representation sharing (Song and Chai, NeurIPS 2018).

The authors' train_one.py --avg --bpscale.
"""

from torch import Tensor

from okddip.methods.base import Distillation, Losses, with_ensemble
from okddip.methods.losses import hard_loss, mean_of_others
from okddip.outputs import GroupOutput


class CLILR(Distillation):
    """hard + alpha * ramp * soft: each branch imitates the mean of the others' logits.

    Its other half, dividing the gradient by P where the trunk ends, is `rescale` of the group.
    """

    def losses(self, output: GroupOutput, labels: Tensor, ramp: Tensor) -> Losses:
        hard = hard_loss(output.logits, labels)
        targets = self.soften(mean_of_others(self.sources(output.logits)))  # [P, B, K]
        soft = self.soft_loss(output.logits, targets)
        total = self.weighted(hard, soft, ramp)
        return Losses(total, {"hard": hard, "soft": soft}, with_ensemble(output.logits, self.peers))
