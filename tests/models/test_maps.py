"""The last feature maps of peers, for methods that read them."""

from functools import partial

import pytest
import torch
from torch import nn

from okddip.errors import Incompatible
from okddip.models.backbone import Backbone
from okddip.models.fx import torchvision_model
from okddip.models.group import PeerGroup
from okddip.models.resnet import resnet


@pytest.mark.parametrize("structure", ["branch", "network"])
def test_maps_are_what_pooling_reads_and_change_nothing(structure: str) -> None:
    outputs = []
    for maps in (False, True):
        torch.manual_seed(0)
        group = PeerGroup(partial(resnet, 10, depth=8), 2, structure, maps=maps)
        outputs.append(group(torch.ones(2, 3, 16, 16)))
    plain, output = outputs
    assert plain.maps is None
    assert output.maps is not None
    assert torch.equal(plain.logits, output.logits)
    assert torch.equal(output.maps.mean((3, 4)), output.features)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "split", "channels"), [("resnet18", "layer3", 512), ("mobilenet_v2", "features.18", 1280)]
)
def test_maps_of_traced_networks_and_weights_saved_before_their_heads_had_two_parts(
    name: str, split: str, channels: int
) -> None:
    make = partial(torchvision_model, 10, name=name, split=split)
    group = PeerGroup(make, 1, maps=True).eval()
    output = group(torch.randn(2, 3, 64, 64))
    assert make().map_channels == channels
    assert output.maps is not None
    assert output.maps.shape == (1, 2, channels, 2, 2)
    parts = ("peers.0.head.maps.", "peers.0.head.pool.")
    older = {
        key.replace(parts[0], "peers.0.head.").replace(parts[1], "peers.0.head."): value
        for key, value in group.state_dict().items()
    }
    other = PeerGroup(make, 1)
    other.load_state_dict(older)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in group.state_dict().items())


def test_a_head_that_does_not_tell_its_maps_is_refused() -> None:
    class Head(nn.Module):
        pass

    def make() -> Backbone:
        return Backbone(nn.Identity(), Head(), nn.Identity(), feature_dim=3, trunk_channels=3)

    assert not PeerGroup(make, 2).maps
    with pytest.raises(Incompatible, match=r"must be an nn\.Sequential"):
        PeerGroup(make, 2, maps=True)
