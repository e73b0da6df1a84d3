"""Every number in golden/newer.npz, written out from the papers of KDCL, PCL and FFL, through the methods."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from okddip.methods.base import Losses, Method
from okddip.methods.ffl import FFL
from okddip.methods.kdcl import KDCL
from okddip.methods.pcl import PCL
from okddip.outputs import GroupOutput

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "newer.npz")
OPTIONS = ["method.temperature=3", "method.alpha=0.7"]

MakeMethod = Callable[..., Method]


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def students_first(name: str) -> Tensor:
    """The file has students last."""
    return golden(name).movedim(-1, 0).contiguous()


def agrees(value: Tensor, expected: Tensor) -> None:
    """To 1e-9 of the largest absolute value."""
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-9 * expected.abs().max().item())


def check_losses(losses: Losses, name: str, parts: list[str]) -> None:
    losses.total.backward()
    agrees(losses.total, golden(f"{name}/total"))
    assert list(losses.parts) == parts
    for part in parts:
        agrees(losses.parts[part], golden(f"{name}/{part}"))


LABELS = golden("input/labels")
RAMP = golden("input/ramp_weight")


@pytest.mark.parametrize("target", ["minlogit", "naive", "mean"])
def test_kdcl_agrees_with_the_paper(make_method: MakeMethod, target: str) -> None:
    overrides = ["method.peers=3", f"method.target={target}", "method.ramp_epochs=80"]
    method = make_method("kdcl", *OPTIONS, *overrides)
    assert isinstance(method, KDCL)
    logits = students_first("input/logits").requires_grad_()
    losses = method(GroupOutput(logits, torch.zeros(3, 6, 64), None), LABELS, RAMP)
    check_losses(losses, f"kdcl_{target}", ["hard", "soft"])
    agrees(method.target_logits(logits, LABELS), golden(f"kdcl_{target}/target_logits"))
    agrees(logits.grad, students_first(f"kdcl_{target}/grad_logits"))


def test_pcl_agrees_with_the_paper(make_method: MakeMethod) -> None:
    method = make_method("pcl", *OPTIONS, feature_dim=16, classes=5).double()
    assert isinstance(method, PCL)
    method.load_state_dict(
        {"classifier.weight": golden("input/pcl_weight"), "classifier.bias": golden("input/pcl_bias")}
    )
    logits = students_first("input/logits").requires_grad_()
    features = students_first("input/features").requires_grad_()
    averages = students_first("input/ema_logits")
    losses = method(GroupOutput(logits, features, None, averages=averages), LABELS, RAMP)
    check_losses(losses, "pcl", ["hard", "ensemble", "mean_teacher"])
    agrees(losses.predictions[method.measured.index("classifier")], golden("pcl/ensemble_logits"))
    assert torch.equal(losses.predictions[method.measured.index("ema/peer1")], averages[1])
    agrees(logits.grad, students_first("pcl/grad_logits"))
    agrees(features.grad, students_first("pcl/grad_features"))
    agrees(method.classifier.weight.grad, golden("pcl/grad_pcl_weight"))
    agrees(method.classifier.bias.grad, golden("pcl/grad_pcl_bias"))


def test_ffl_agrees_with_the_paper(make_method: MakeMethod) -> None:
    method = make_method("ffl", *OPTIONS, map_channels=8, classes=5).double()
    assert isinstance(method, FFL)
    weights = {
        "depthwise.weight": golden("input/ffl_depthwise"),
        "pointwise.weight": golden("input/ffl_pointwise"),
        "linear.weight": golden("input/ffl_fc_weight"),
        "linear.bias": golden("input/ffl_fc_bias"),
    }
    assert not method.fusion.load_state_dict(weights, strict=False).unexpected_keys
    maps = students_first("input/maps").requires_grad_()
    logits = students_first("input/logits")[:2].requires_grad_()
    losses = method(GroupOutput(logits, torch.zeros(2, 6, 64), None, maps=maps), LABELS, RAMP)
    check_losses(losses, "ffl", ["hard", "fusion_to_peers", "ensemble_to_fusion"])
    agrees(losses.predictions[method.predictors.index("fusion")], golden("ffl/fused_logits"))
    agrees(logits.grad, students_first("ffl/grad_logits")[:2])
    agrees(maps.grad, students_first("ffl/grad_maps"))
    parameters = dict(method.fusion.named_parameters())
    for parameter, name in (
        *(("depthwise.weight", "depthwise"), ("pointwise.weight", "pointwise")),
        *(("linear.weight", "fc_weight"), ("linear.bias", "fc_bias")),
    ):
        agrees(parameters[parameter].grad, golden(f"ffl/grad_ffl_{name}"))
