"""Whose accuracy a run reports, and what it costs, with real networks."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from okddip.methods.base import Method
from okddip.models.backbone import Backbone
from okddip.models.resnet import resnet
from okddip.run.cost import cost_tags, forward_flops
from okddip.training.peers import make_group

RESNET_32 = 466_906  # parameters
# a convolution 3x3 of C to D channels at h x h multiplies 9 C D h^2 times, a shortcut C D h^2
MULTIPLICATIONS = (
    9 * (3 * 16 + 10 * 16 * 16) * 32**2
    + (9 * (16 * 32 + 9 * 32 * 32) + 16 * 32) * 16**2
    + (9 * (32 * 64 + 9 * 64 * 64) + 32 * 64) * 8**2
    + 64 * 10
)
resnet32: Callable[[], Backbone] = partial(resnet, depth=32, num_classes=10, in_channels=3)


@pytest.mark.parametrize(
    ("option", "overrides", "predictor", "trained"),
    [
        ("baseline", (), "student", RESNET_32),
        ("okddip", (), "leader", 1_530_872),  # as the authors' code has it
        ("one", (), "mean", 1_529_988),
        ("dml", (), "mean", 4 * RESNET_32),
        ("pcl", (), "ema/mean", 1_177_464),  # without the moving averages, which are not trained
    ],
)
def test_a_network_is_kept_whatever_it_was_trained_with(
    make_method: Callable[..., Method], option: str, overrides: tuple[str, ...], predictor: str, trained: int
) -> None:
    method = make_method(option, *overrides)
    group = make_group(resnet32, method)
    before = {name: tensor.clone() for name, tensor in group.state_dict().items()}
    assert cost_tags(group, method, (3, 32, 32)) == {
        "predictor": predictor,
        "parameters.trained": str(trained),
        "parameters.kept": str(RESNET_32),
        "flops.kept": str(2 * MULTIPLICATIONS),
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in group.state_dict().items())


def test_an_ensemble_costs_all_of_its_peers(make_method: Callable[..., Method]) -> None:
    method = make_method("okddip", "method.leader=false", "method.structure=network")
    found = cost_tags(make_group(resnet32, method), method, (3, 32, 32))
    assert found["predictor"] == "ensemble"
    assert found["parameters.kept"] == str(4 * RESNET_32)
    assert found["flops.kept"] == str(4 * 2 * MULTIPLICATIONS)


def test_the_mean_of_networks_that_differ_costs_their_mean(make_method: Callable[..., Method]) -> None:
    method = make_method("dml", "method.peers=2", feature_dims=(64, 64))
    resnet8 = partial(resnet, depth=8, num_classes=10, in_channels=3)
    found = cost_tags(make_group([resnet8, resnet32], method), method, (3, 32, 32))
    assert found["predictor"] == "mean"
    assert found["parameters.trained"] == str(78_042 + RESNET_32)
    assert found["parameters.kept"] == str((78_042 + RESNET_32) // 2)
    assert 0 < int(found["flops.kept"]) < 2 * MULTIPLICATIONS


def test_a_network_that_needs_numbers_has_no_count() -> None:
    class Asks(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images if images.sum() > 0 else -images

    assert forward_flops(Asks(), (1, 8, 8)) is None
