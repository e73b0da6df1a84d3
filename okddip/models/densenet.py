"""DenseNet-BC for small images.

The architecture is that of Huang et al. (CVPR 2017, section 3) as OKDDip's authors build it in
`models/model_cifar/densenet.py`: a 3x3 stem of 24 channels, three dense blocks of n layers (a 1x1 convolution
to four times the growth rate, then a 3x3), transitions that halve channels and size, a final norm. He
initialisation by fan-in for convolutions, linear bias zero. The trunk ends with the second transition; a
branch is the third dense block with the final norm, pooling and classifier, and each branch owns all of
it. (In their `densenet_GL.py` all branches hold the same block.)
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from okddip.errors import ConfigError, check_choice, check_number
from okddip.models.backbone import Backbone, GlobalAveragePool

STEM_CHANNELS = 24
BOTTLENECK = 4  # width of a layer's 1x1 convolution, in growth rates


def densenet(
    num_classes: int,
    in_channels: int = 3,
    *,
    depth: int,
    growth: int,
    dropout: float = 0.0,
    efficient: bool = False,
) -> Backbone:
    """Build a DenseNet-BC; any number of input channels, images of at least 4x4.

    Args:
        num_classes: K.
        in_channels: C.
        depth: 6n+4 for n layers a block.
        growth: channels that each layer adds.
        dropout: probability after each layer.
        efficient: keep only the outputs of layers for the backward pass and compute concatenations and
            their norms again (gradient checkpointing, Pleiss et al., arXiv 1707.06990): less memory, more
            time, the same numbers.

    Raises:
        ConfigError: an option is out of range, or the depth fits no whole number of layers.
    """
    check_number("model.depth", depth, minimum=10, maximum=2000, integer=True)
    check_number("model.growth", growth, minimum=1, maximum=1000, integer=True)
    check_number("model.dropout", dropout, minimum=0, below=1)
    check_choice("model.efficient", efficient, (True, False))
    layers, left_over = divmod(depth - 4, 6)
    if left_over:
        raise ConfigError(
            f"model.depth={depth}: must be 6n+4, such as {depth - left_over} or {depth - left_over + 6}."
        )

    def block(in_channels: int) -> DenseBlock:
        inputs = [in_channels + i * growth for i in range(layers)]
        return DenseBlock(DenseLayer(i, growth, dropout, efficient) for i in inputs)

    grown1 = STEM_CHANNELS + layers * growth
    grown2 = grown1 // 2 + layers * growth
    grown3 = grown2 // 2 + layers * growth
    trunk = nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(in_channels, STEM_CHANNELS, 3, padding=1, bias=False),
            block1=block(STEM_CHANNELS),
            transition1=transition(grown1, grown1 // 2),
            block2=block(grown1 // 2),
            transition2=transition(grown2, grown2 // 2),
        )
    )
    head = nn.Sequential(
        OrderedDict(
            block3=block(grown2 // 2),
            norm=nn.BatchNorm2d(grown3),
            relu=nn.ReLU(inplace=True),
            pool=GlobalAveragePool(),
        )
    )
    classifier = nn.Linear(grown3, num_classes)
    for module in (*trunk.modules(), *head.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    nn.init.zeros_(classifier.bias)
    return Backbone(trunk, head, classifier, feature_dim=grown3, trunk_channels=grown2 // 2, minimum_size=4)


class DenseBlock(nn.ModuleList):
    """n layers, each reading the outputs of all before it, [B, i, h, w] -> [B, i + n * growth, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseLayer(nn.Module):
    """A 1x1 and a 3x3 convolution over the concatenation of all features, i channels -> [B, growth, h, w]."""

    def __init__(self, in_channels: int, growth: int, dropout: float, efficient: bool) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, BOTTLENECK * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(BOTTLENECK * growth)
        self.conv2 = nn.Conv2d(BOTTLENECK * growth, growth, 3, padding=1, bias=False)
        self.dropout = dropout
        self.efficient = efficient

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.checkpointed_bottleneck(features) if self.efficient else self.bottleneck(*features)
        x = self.conv2(self.norm2(x).relu_())
        return F.dropout(x, self.dropout, self.training) if self.dropout > 0 else x

    def bottleneck(self, *features: Tensor) -> Tensor:
        return self.conv1(self.norm1(torch.cat(features, 1)).relu_())

    def checkpointed_bottleneck(self, features: list[Tensor]) -> Tensor:
        # nothing in a bottleneck is random, so no generator state has to be saved
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if not torch.compiler.is_compiling():  # a compiled step updates the statistics only once
            options["context_fn"] = lambda: (nullcontext(), frozen_statistics(self.norm1))
        return checkpoint(self.bottleneck, *features, **options)


@contextmanager
def frozen_statistics(norm: nn.BatchNorm2d) -> Iterator[None]:
    """Normalise by the batch without counting it, so that computing a layer again counts no batch twice."""
    momentum, counter = norm.momentum, norm.num_batches_tracked
    norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        norm.momentum, norm.num_batches_tracked = momentum, counter


def transition(in_channels: int, out_channels: int) -> nn.Sequential:
    """Between dense blocks: fewer channels and half the size, [B, i, h, w] -> [B, o, h/2, w/2]."""
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(in_channels),
            relu=nn.ReLU(inplace=True),
            conv=nn.Conv2d(in_channels, out_channels, 1, bias=False),
            pool=nn.AvgPool2d(2),
        )
    )
