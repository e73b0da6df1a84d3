"""Parameters of the models of OKDDip's authors, alone and as four peers with OKDDip's projections."""

import pytest
import torch
from model_options import factory, parameters

from okddip.models.group import PeerGroup

# (10 classes, 100 classes) of the plain network, of four branches and of four networks
COUNTS = {
    "resnet32": ((466_906, 472_756), (1_530_872, 1_554_272), (1_868_648, 1_892_048)),
    "resnet110": ((1_147_738, 1_170_868), (3_781_496, 3_874_016), (4_607_336, 4_699_856)),
    "wrn20_8": ((6_848_090, 6_871_220), (22_519_416, 22_611_936), (27_408_744, 27_501_264)),
    "vgg16": ((15_253_578, 15_299_748), (38_157_928, 38_342_608), (61_079_848, 61_264_528)),
    "vgg19": ((20_565_834, 20_612_004), (50_552_680, 50_737_360), None),
    "densenet40_12": ((176_122, 188_092), None, (708_712, 756_592)),
    "densenet100_12": ((769_162, 800_032), None, None),
}
# ONE with four branches and its gate
ONE = {
    "resnet32": (1_529_988, 1_553_388),
    "resnet110": (3_765_636, 3_858_156),
    "wrn20_8": (22_503_556, 22_596_076),
}


def projections(feature_dim: int) -> int:
    return 2 * feature_dim * (feature_dim // 8)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("option", COUNTS)
def test_plain_and_okddip(option: str, classes: int) -> None:
    column = (10, 100).index(classes)
    plain, branch, network = COUNTS[option]
    with torch.device("meta"):
        make = factory(option, num_classes=classes)
        backbone = make()
        assert parameters(backbone) == plain[column]
        for structure, count in (("branch", branch), ("network", network)):
            if count is not None:
                group = PeerGroup(make, peers=4, structure=structure)
                assert parameters(group) + projections(backbone.feature_dim) == count[column]


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("option", ONE)
def test_one(option: str, classes: int) -> None:
    with torch.device("meta"):
        group = PeerGroup(factory(option, num_classes=classes), peers=4)
    gate = (group.dimensions[0]["trunk_channels"] + 1) * 4 + 2 * 4  # linear, batch norm
    assert parameters(group) + gate == ONE[option][(10, 100).index(classes)]


def dense_block(in_channels: int, layers: int, growth: int) -> int:
    """Parameters of a dense block: norm and 1x1 convolution, norm and 3x3 convolution in each layer."""
    inputs = [in_channels + i * growth for i in range(layers)]
    return sum(2 * c + c * 4 * growth + 2 * 4 * growth + 4 * growth * growth * 9 for c in inputs)


@pytest.mark.parametrize("classes", [10, 100])
def test_densenet_branches_own_their_last_block(classes: int) -> None:
    """The authors' four branches hold one and the same block, so their count is not ours."""
    plain = COUNTS["densenet40_12"][0][(10, 100).index(classes)]
    own = dense_block(60, layers=6, growth=12) + 2 * 132 + (132 + 1) * classes
    with torch.device("meta"):
        group = PeerGroup(factory("densenet40_12", num_classes=classes), peers=4)
    assert parameters(group) + projections(132) == plain + 3 * own + 2 * 132 * 16
    assert [group.dimensions[0][name] for name in ("trunk_channels", "feature_dim")] == [60, 132]


def test_resnet34_for_imagenet() -> None:
    with torch.device("meta"):
        assert parameters(factory("resnet34", num_classes=1000)()) == 21_797_672
