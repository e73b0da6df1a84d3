"""Methods whose peers are networks of different architectures."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from okddip.data.sources import digits
from okddip.errors import Incompatible
from okddip.methods.base import Method
from okddip.methods.okddip import OKDDip
from okddip.methods.pcl import PCL
from okddip.models.backbone import dimensions_of
from okddip.models.group import PeerGroup
from okddip.models.resnet import resnet
from okddip.training.peers import make_group

MakeMethod = Callable[..., Method]

narrow = partial(resnet, 10, depth=8, in_channels=1)  # 64 features
wide = partial(resnet, 10, depth=11, block="bottleneck", in_channels=1)  # 256


def make(make_method: MakeMethod, option: str, *overrides: str) -> tuple[PeerGroup, Method]:
    torch.manual_seed(0)
    factories = [narrow, wide, narrow]
    dimensions = dimensions_of([make_one() for make_one in factories])
    settings = ("method.peers=3", "method.structure=network", *overrides)
    method = make_method(option, *settings, **dimensions)
    return make_group(factories, method), method


@pytest.mark.parametrize(
    ("option", "overrides"),
    [
        ("independent", []),
        ("dml", []),
        ("kdcl", []),
        ("cl_ilr", ["method.rescale=false"]),
        ("okddip", []),
        ("okddip", ["method.leader=false"]),
        ("pcl", []),
    ],
)
def test_every_parameter_gets_a_gradient(make_method: MakeMethod, option: str, overrides: list[str]) -> None:
    group, method = make(make_method, option, *overrides)
    split = digits(image_size=16).train
    images = split.images[:16].permute(0, 3, 1, 2).float() / 255 - 0.3
    losses = method(group(images), split.labels[:16], torch.tensor(1.0))
    losses.total.backward()
    assert losses.predictions.isfinite().all()
    for name, parameter in [*group.named_parameters(), *method.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-7, name


@torch.no_grad()
def test_each_length_of_features_has_its_projections_to_a_common_one(make_method: MakeMethod) -> None:
    group, method = make(make_method, "okddip", "method.leader=false")
    assert isinstance(method, OKDDip)
    shapes = {name: tuple(parameter.shape) for name, parameter in method.named_parameters()}
    assert shapes == {
        **{"query.of_length.64.weight": (8, 64), "query.of_length.256.weight": (8, 256)},
        **{"key.of_length.64.weight": (8, 64), "key.of_length.256.weight": (8, 256)},
    }
    weights = dict(method.named_parameters())
    features = group(torch.randn(5, 1, 16, 16)).features
    asks, answers = (
        [features[peer, :, :size] @ weights[f"{which}.of_length.{size}.weight"].T for peer, size in SIZES]
        for which in ("query", "key")
    )
    energy = torch.stack([torch.stack([(q * k).sum(-1) for k in answers], -1) for q in asks], 1)
    torch.testing.assert_close(method.attend(features), energy.softmax(-1))


SIZES = ((0, 64), (1, 256), (2, 64))


def test_a_leader_has_no_projection_as_nobody_asks_it(make_method: MakeMethod) -> None:
    dimensions = {"feature_dim": 256, "feature_dims": [64, 64, 256]}
    method = make_method("okddip", "method.peers=3", "method.structure=network", **dimensions)
    assert [name for name, _ in method.named_parameters()] == [
        "query.of_length.64.weight",
        "key.of_length.64.weight",
    ]


@torch.no_grad()
def test_the_peer_ensemble_sees_the_features_of_each_and_not_what_fills_them_up(
    make_method: MakeMethod,
) -> None:
    group, method = make(make_method, "pcl")
    assert isinstance(method, PCL)
    assert method.classifier is not None
    output = group(torch.randn(4, 1, 16, 16))
    own = torch.cat([output.features[peer, :, :size] for peer, size in SIZES], 1)
    torch.testing.assert_close(method.combine(output), method.classifier(own))


def test_maps_of_different_channels_are_not_fused(make_method: MakeMethod) -> None:
    with pytest.raises(Incompatible, match=r"model\.peers: .* different numbers of channels"):
        make(make_method, "ffl")
