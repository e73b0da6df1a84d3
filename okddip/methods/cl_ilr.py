"""Collaborative learning with intermediate-level representation sharing (Song and Chai, NeurIPS 2018).

The authors' train_one.py --avg --bpscale.
"""

from typing import Any

from torch import Tensor

from okddip.errors import check_choice
from okddip.methods.base import Losses, Method, Ramp, with_ensemble
from okddip.methods.losses import check_soft_loss, hard_loss, log_softened, mean_of_others, soft_loss
from okddip.models.group import GroupOutput


class CLILR(Method):
    """hard + alpha * ramp * soft: each branch imitates the mean of the others' logits.

    Its other half, dividing the gradient by P where the trunk ends, is `rescale` of the group.
    """

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
            detach_targets: send no gradient through the targets.
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

    def losses(self, output: GroupOutput, labels: Tensor, ramp: Tensor) -> Losses:
        hard = hard_loss(output.logits, labels)
        sources = output.logits.detach() if self.detach_targets else output.logits
        targets = log_softened(mean_of_others(sources), self.temperature)  # [P, B, K]
        soft = soft_loss(output.logits, targets, self.temperature, self.loss)
        total = hard + self.alpha * ramp * soft
        return Losses(total, {"hard": hard, "soft": soft}, with_ensemble(output.logits, self.peers))
