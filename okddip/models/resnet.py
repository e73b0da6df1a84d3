"""Residual networks for small images.

The architecture is that of He et al. (CVPR 2016, section 4.2) as OKDDip's authors build it in
`models/model_cifar/resnet.py`: a 3x3 stem of 16 channels, three stages of 16, 32 and 64 channels (times 4
with bottleneck blocks), 1x1 projection shortcuts where the shape changes, He initialisation by fan-out.
A branch (their `resnet_GL.py`) is the third stage with pooling and classifier.
"""

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn

from okddip.errors import ConfigError, check_choice, check_number
from okddip.models.backbone import Backbone, GlobalAveragePool


def resnet(
    num_classes: int,
    in_channels: int = 3,
    *,
    depth: int,
    block: str = "basic",
    inner_width: int = 1,
) -> Backbone:
    """Build a residual network; any number of input channels, any image size.

    Args:
        num_classes: K.
        in_channels: C.
        depth: number of layers with weights, projections apart: 6n+2 for basic blocks, 9n+2 for
            bottleneck blocks, n blocks a stage.
        block: `basic` (two 3x3 convolutions) or `bottleneck` (1x1, 3x3, 1x1).
        inner_width: factor on the width of a bottleneck's 3x3 convolution.

    Raises:
        ConfigError: an option is out of range, or the depth fits no whole number of blocks.
    """
    check_choice("model.block", block, ("basic", "bottleneck"))
    check_number("model.inner_width", inner_width, minimum=1, maximum=1000, integer=True)
    if block == "basic" and inner_width != 1:
        raise ConfigError(
            f"model.inner_width={inner_width}: a basic block has no inner width. "
            "Set model.block=bottleneck or model.inner_width=1."
        )
    layers = 6 if block == "basic" else 9  # of one block in each of the three stages
    check_number("model.depth", depth, minimum=layers + 2, maximum=2000, integer=True)
    blocks, left_over = divmod(depth - 2, layers)
    if left_over:
        raise ConfigError(
            f"model.depth={depth}: must be {layers}n+2 with {block} blocks, "
            f"such as {depth - left_over} or {depth - left_over + layers}."
        )

    make_block = BasicBlock if block == "basic" else partial(Bottleneck, inner_width=inner_width)
    expansion = 1 if block == "basic" else 4

    def stage(in_channels: int, width: int, stride: int) -> nn.Sequential:
        later = [make_block(expansion * width, width, stride=1) for _ in range(blocks - 1)]
        return nn.Sequential(make_block(in_channels, width, stride=stride), *later)

    trunk = nn.Sequential(
        OrderedDict(
            stem=convolution(in_channels, 16, 3),
            norm=nn.BatchNorm2d(16),
            relu=nn.ReLU(inplace=True),
            stage1=stage(16, 16, stride=1),
            stage2=stage(16 * expansion, 32, stride=2),
        )
    )
    head = nn.Sequential(OrderedDict(stage3=stage(32 * expansion, 64, stride=2), pool=GlobalAveragePool()))
    classifier = nn.Linear(64 * expansion, num_classes)
    for module in (*trunk.modules(), *head.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return Backbone(trunk, head, classifier, feature_dim=64 * expansion, trunk_channels=32 * expansion)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, [B, in_channels, h, w] -> [B, width, h/stride, w/stride]."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, width, 3, stride)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = projection(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm1(self.conv1(x)).relu_()
        residual = self.norm2(self.conv2(residual))
        return residual.add_(self.shortcut(x)).relu_()


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones and a shortcut.

    [B, in_channels, h, w] -> [B, 4 * width, h/stride, w/stride].
    """

    def __init__(self, in_channels: int, width: int, stride: int, inner_width: int) -> None:
        super().__init__()
        inner_channels, out_channels = inner_width * width, 4 * width
        self.conv1 = convolution(in_channels, inner_channels, 1)
        self.norm1 = nn.BatchNorm2d(inner_channels)
        self.conv2 = convolution(inner_channels, inner_channels, 3, stride)
        self.norm2 = nn.BatchNorm2d(inner_channels)
        self.conv3 = convolution(inner_channels, out_channels, 1)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm1(self.conv1(x)).relu_()
        residual = self.norm2(self.conv2(residual)).relu_()
        residual = self.norm3(self.conv3(residual))
        return residual.add_(self.shortcut(x)).relu_()


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The shortcut: a 1x1 convolution with batch norm where the shape changes, else the identity."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        OrderedDict(conv=convolution(in_channels, out_channels, 1, stride), norm=nn.BatchNorm2d(out_channels))
    )


def convolution(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
