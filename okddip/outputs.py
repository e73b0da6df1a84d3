"""What models hand to methods, so that neither has to know the other."""

from typing import NamedTuple

from torch import Tensor

STRUCTURES = ("branch", "network")  # of a group of peers: they share their early stages, or nothing


class GroupOutput(NamedTuple):
    """What a method sees of the peers."""

    logits: Tensor  # [P, B, K]
    features: Tensor  # [P, B, D]; where networks have fewer than D, zeros follow
    trunk: Tensor | None  # [B, c, h, w]; None where nothing is shared
    teacher: Tensor | None = None  # [B, K], of a trained network that does not learn; of several [T, B, K]
    averages: Tensor | None = None  # [P, B, K], of moving averages of the peers, where they are kept
    maps: Tensor | None = (
        None  # [P, B, c', h', w'], last feature maps before pooling, where a method needs them
    )
