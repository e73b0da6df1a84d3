import math

import pytest
import torch
from torch import nn

from okddip.errors import ConfigError
from okddip.models.group import PeerGroup
from okddip.models.vgg import vgg


def test_depth_counts_convolutions_and_linear_layers() -> None:
    with torch.device("meta"):
        for depth in (16, 19):
            layers = [m for m in vgg(10, depth=depth).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
            assert len(layers) == depth


def test_smallest_image_is_32_pixels() -> None:
    with torch.device("meta"):
        network = vgg(10, depth=16)
        assert network.minimum_size == 32
        assert network(torch.empty(2, 3, 32, 32)).shape == (2, 10)
        with pytest.raises(RuntimeError):
            network(torch.empty(2, 3, 31, 31))


def test_larger_images_are_averaged_at_the_end() -> None:
    with torch.device("meta"):
        network = vgg(10, depth=16)
        assert network.head.block5(network.trunk(torch.empty(2, 3, 96, 64))).shape == (2, 512, 3, 2)
        assert network(torch.empty(2, 3, 96, 64)).shape == (2, 10)


def test_initial_weights_are_the_authors() -> None:
    torch.manual_seed(0)
    for module in vgg(100, depth=16).modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.out_channels * 9))
        elif isinstance(module, nn.Linear):
            expected = 0.01
        else:
            continue
        tolerance = 5 / math.sqrt(2 * module.weight.numel())
        assert module.weight.std().item() == pytest.approx(expected, rel=tolerance)
        assert module.bias is not None
        assert not module.bias.any()


@pytest.mark.parametrize("structure", ["branch", "network"])
def test_dropout_is_one_option_for_all(structure: str) -> None:
    for dropout in (0.0, 0.5):
        with torch.device("meta"):
            group = PeerGroup(lambda p=dropout: vgg(10, depth=16, dropout=p), peers=2, structure=structure)
            peer = group.extract(0)
        for module, peers in ((group, 2), (peer, 1)):
            rates = [m.p for m in module.modules() if isinstance(m, nn.Dropout)]
            assert rates == [dropout] * 2 * peers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 17}, r"model\.depth=17: must be one of 16, 19"),
        ({"depth": 16, "dropout": 1.0}, r"model\.dropout=1\.0: .*less than 1"),
        ({"depth": 16, "dropout": -0.1}, r"model\.dropout=-0\.1: .*at least 0"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vgg(10, **options)
