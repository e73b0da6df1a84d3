import math

import pytest
import torch
import torchvision

from okddip.errors import ConfigError
from okddip.models.imagenet import ARCHITECTURES, resnet


def test_logits_are_torchvisions() -> None:
    torch.manual_seed(0)
    network = resnet(10, architecture="resnet18").eval()
    torch.manual_seed(0)
    original = torchvision.models.resnet18(num_classes=10).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(network(images), original(images))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_of_torchvisions_is_there(architecture: str) -> None:
    with torch.device("meta"):
        network = resnet(1000, architecture=architecture)
        original = torchvision.models.get_model(architecture)
    ours = {name.split(".", 1)[1] for name in network.state_dict() if not name.startswith("classifier.")}
    assert ours == {name for name in original.state_dict() if not name.startswith("fc.")}


def test_stem_of_other_channels_starts_with_he_fan_out() -> None:
    torch.manual_seed(0)
    stem = resnet(10, in_channels=1, architecture="resnet18").trunk.conv1
    assert stem.weight.shape == (64, 1, 7, 7)
    assert stem.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 49)), rel=0.05)


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.architecture=resnet35: must be one of resnet18"):
        resnet(10, architecture="resnet35")
