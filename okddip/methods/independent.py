"""Peers that learn from the labels alone: the paper's "Ind" (the authors' train_one.py --ind)."""

from torch import Tensor

from okddip.methods.base import Losses, Method, with_ensemble
from okddip.methods.losses import hard_loss
from okddip.outputs import GroupOutput


class Independent(Method):
    """The loss is the sum of the peers' cross-entropies; branches still share what their trunk learns."""

    def losses(self, output: GroupOutput, labels: Tensor, ramp: Tensor) -> Losses:
        hard = hard_loss(output.logits, labels)
        return Losses(hard, {"hard": hard}, with_ensemble(output.logits, self.peers))
