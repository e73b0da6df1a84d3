import math
from functools import partial

import pytest
import torch
from torch import nn

from okddip.errors import ConfigError
from okddip.models.resnet import BasicBlock, Bottleneck, resnet


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 44, 56])
def test_depth_counts_the_layers_with_weights(depth: int) -> None:
    with torch.device("meta"):
        backbone = resnet(10, depth=depth)
    layers = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]
    assert len(layers) == depth
    assert sum(isinstance(module, BasicBlock) for module in backbone.modules()) == (depth - 2) // 2


def test_shortcuts_project_where_the_shape_changes() -> None:
    with torch.device("meta"):
        basic, bottleneck = resnet(10, depth=14), resnet(10, depth=20, block="bottleneck")
    for backbone, kind, projected in ((basic, BasicBlock, 2), (bottleneck, Bottleneck, 3)):
        shortcuts = [module.shortcut for module in backbone.modules() if isinstance(module, kind)]
        assert sum(isinstance(shortcut, nn.Sequential) for shortcut in shortcuts) == projected
        assert sum(isinstance(shortcut, nn.Identity) for shortcut in shortcuts) == 6 - projected


def test_inner_width_widens_the_3x3_convolutions_alone() -> None:
    with torch.device("meta"):
        block = resnet(10, depth=20, block="bottleneck", inner_width=8).head.stage3[0]
    assert block.conv2.weight.shape == (512, 512, 3, 3)
    assert block.conv3.out_channels == 256


def test_convolutions_start_with_he_fan_out() -> None:
    torch.manual_seed(0)
    for make in (partial(resnet, depth=20), partial(resnet, depth=20, block="bottleneck", inner_width=2)):
        for module in make(10).modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.weight[0, 0].numel()
                expected = math.sqrt(2 / fan_out)
                # a sample's standard deviation scatters by 1/sqrt(2n)
                tolerance = 5 / math.sqrt(2 * module.weight.numel())
                assert module.weight.std().item() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 33}, r"model\.depth=33: must be 6n\+2 with basic blocks, such as 32 or 38"),
        ({"depth": 32, "block": "bottleneck"}, r"model\.depth=32: must be 9n\+2 with bottleneck blocks"),
        ({"depth": 2}, r"model\.depth=2: .*at least 8"),
        ({"depth": "deep"}, r"model\.depth=deep: must be a whole number"),
        ({"depth": 8, "block": "dense"}, r"model\.block=dense: must be one of basic, bottleneck"),
        ({"depth": 8, "inner_width": 2}, r"model\.inner_width=2: a basic block has no inner width"),
        ({"depth": 11, "block": "bottleneck", "inner_width": 0}, r"model\.inner_width=0: .*at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resnet(10, **options)
