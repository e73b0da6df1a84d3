"""What models hand to methods, so that neither has to know the other."""

from typing import NamedTuple

from torch import Tensor

STRUCTURES = ("branch", "network")  # of a group of peers: they share their early stages, or nothing


class GroupOutput(NamedTuple):
    """What a method sees of the peers."""

    logits: Tensor  # [P, B, K]
    features: Tensor  # [P, B, D]
    trunk: Tensor | None  # [B, c, h, w]; None where nothing is shared
    teacher: Tensor | None = None  # [B, K], of a trained network that does not learn, where there is one
