"""The contract of every model: a trunk that peers may share, a head and a classifier that each peer owns."""

from torch import Tensor, nn


class Backbone(nn.Module):
    """A plain classification network in three parts; its forward is what inference runs.

    Args:
        trunk: [B, C, H, W] -> [B, c, h, w]; the early stages, shared by peers with `method.structure=branch`.
        head: [B, c, h, w] -> [B, D]; the last stage with its pooling, one per peer. It must not write to
            its input, which other heads read too.
        classifier: [B, D] -> [B, K].
        feature_dim: D.
        trunk_channels: c.
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
        minimum_size: int = 1,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.classifier = classifier
        self.feature_dim = feature_dim
        self.trunk_channels = trunk_channels
        self.minimum_size = minimum_size

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, K]."""
        return self.classifier(self.head(self.trunk(images)))


class GlobalAveragePool(nn.Module):
    """The mean over all positions, [B, D, h, w] -> [B, D]."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))
