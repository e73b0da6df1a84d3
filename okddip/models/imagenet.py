"""ResNets and ResNeXt for ImageNet: torchvision's layers and initialisation, cut before the last stage."""

from collections import OrderedDict

import torchvision
from torch import nn

from okddip.errors import check_choice
from okddip.models.backbone import Backbone, GlobalAveragePool

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d")


def resnet(num_classes: int, in_channels: int = 3, *, architecture: str) -> Backbone:
    """Build one of torchvision's residual networks (He et al., CVPR 2016; Xie et al., CVPR 2017), untrained.

    The trunk ends with `layer3`; a branch is `layer4` with pooling and classifier. Any image size works; the
    stem and the stages shrink an image 32 times in each direction.

    Args:
        num_classes: K.
        in_channels: C.
        architecture: one of `ARCHITECTURES`.

    Raises:
        ConfigError: `architecture` is not one of them.
    """
    check_choice("model.architecture", architecture, ARCHITECTURES)
    model = torchvision.models.get_model(architecture, weights=None, num_classes=num_classes)
    if in_channels != 3:
        model.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    shared = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
    trunk = nn.Sequential(OrderedDict((name, getattr(model, name)) for name in shared))
    head = nn.Sequential(OrderedDict(layer4=model.layer4, pool=GlobalAveragePool()))
    feature_dim = model.fc.in_features
    # every stage doubles the channels of the one before
    return Backbone(trunk, head, model.fc, feature_dim=feature_dim, trunk_channels=feature_dim // 2)
