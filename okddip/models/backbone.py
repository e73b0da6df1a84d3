"""The contract of every model: a trunk that peers may share, a head and a classifier that each peer owns."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Backbone(nn.Module):
    """A plain classification network in three parts; its forward is what inference runs.

    Args:
        trunk: [B, C, H, W] -> [B, c, h, w]; the early stages, shared by peers with `method.structure=branch`.
        head: [B, c, h, w] -> [B, D]; the last stage with its pooling, one per peer. It must not write to
            its input, which other heads read too. Methods that read feature maps take what goes into the last
            module of it, which must then be an `nn.Sequential`.
        classifier: [B, D] -> [B, K].
        feature_dim: D.
        trunk_channels: c.
        map_channels: channels of the last feature maps, before pooling; None: D.
        minimum_size: the smallest height and width of an image that the network can take, in pixels.
    """

    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Module,
        classifier: nn.Module,
        *,
        feature_dim: int,
        trunk_channels: int,
        map_channels: int | None = None,
        minimum_size: int = 1,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.classifier = classifier
        self.feature_dim = feature_dim
        self.trunk_channels = trunk_channels
        self.map_channels = feature_dim if map_channels is None else map_channels
        self.minimum_size = minimum_size

    @property
    def dimensions(self) -> dict[str, int]:
        """What a method must know of the network to make what it owns."""
        names = ("feature_dim", "trunk_channels", "map_channels")
        return {name: getattr(self, name) for name in names}

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, K]."""
        return self.classifier(self.head(self.trunk(images)))


def dimensions_of(backbones: Sequence[Backbone]) -> dict[str, Any]:
    """What a method must know of the networks of a group.

    Args:
        backbones: one for all peers, or one for each where they differ; then `feature_dims` has the length of
            each one's features, to the largest of which, `feature_dim`, the others are filled up, and
            `map_channels` is 0 where not all have the same.
    """
    if len(backbones) == 1:
        return dict(backbones[0].dimensions)
    lengths = [backbone.feature_dim for backbone in backbones]
    channels = {backbone.map_channels for backbone in backbones}
    return {
        **{"feature_dim": max(lengths), "feature_dims": lengths},
        "trunk_channels": max(backbone.trunk_channels for backbone in backbones),
        "map_channels": channels.pop() if len(channels) == 1 else 0,
    }


class GlobalAveragePool(nn.Module):
    """The mean over all positions, [B, D, h, w] -> [B, D]."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))
