"""VGG networks with batch norm for small images.

The architecture is that of Simonyan & Zisserman (ICLR 2015, configurations D and E) as OKDDip's authors build
it in `models/model_cifar/vgg.py`: five blocks of 3x3 convolutions with bias and batch norm, each ending in
a 2x2 max pooling, and a classifier of three linear layers, 512-512-K. He initialisation by fan-out for
convolutions, N(0, 0.01) for linear layers, biases zero. A branch (their `vgg_GL.py`) is the fifth block
with the classifier. Ours averages what the fifth block leaves, so that images above 63x63 work too.
"""

from collections import OrderedDict

from torch import nn

from okddip.errors import check_choice, check_number
from okddip.models.backbone import Backbone, GlobalAveragePool

CONVOLUTIONS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # in each block, by depth
WIDTHS = (64, 128, 256, 512, 512)


def vgg(num_classes: int, in_channels: int = 3, *, depth: int, dropout: float = 0.0) -> Backbone:
    """Build a VGG network; any number of input channels, images of at least 32x32.

    Args:
        num_classes: K.
        in_channels: C.
        depth: 16 or 19.
        dropout: probability in the classifier, after its first two linear layers.

    Raises:
        ConfigError: an option is out of range.
    """
    check_choice("model.depth", depth, tuple(CONVOLUTIONS))
    check_number("model.dropout", dropout, minimum=0, below=1)
    inputs = (in_channels, *WIDTHS)
    blocks = [
        block(i, width, convolutions)
        for i, width, convolutions in zip(inputs, WIDTHS, CONVOLUTIONS[depth], strict=False)
    ]
    trunk = nn.Sequential(OrderedDict((f"block{i + 1}", blocks[i]) for i in range(4)))
    head = nn.Sequential(OrderedDict(block5=blocks[4], pool=GlobalAveragePool()))
    classifier = nn.Sequential(
        nn.Linear(512, 512),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(512, 512),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(512, num_classes),
    )
    for module in (*trunk.modules(), *head.modules(), *classifier.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # these have one
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    return Backbone(
        trunk, head, classifier, feature_dim=512, trunk_channels=512, minimum_size=2 ** len(WIDTHS)
    )


def block(in_channels: int, width: int, convolutions: int) -> nn.Sequential:
    """Convolutions with batch norm and ReLU, then a halving, [B, i, h, w] -> [B, width, h/2, w/2]."""
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        in_channels = width
    return nn.Sequential(*layers, nn.MaxPool2d(2))
