"""Every method on every structure it allows, with real networks on real images."""

import copy
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from okddip.data.sources import digits
from okddip.methods.base import Losses, Method
from okddip.models.group import PeerGroup
from okddip.models.resnet import resnet
from okddip.training.peers import make_group

MakeMethod = Callable[..., Method]

slow = partial(pytest.param, marks=pytest.mark.slow)

# option, overrides, structure
CASES = [
    ("baseline", [], "network"),
    ("kd", ["method.teacher=given"], "network"),
    ("independent", [], "branch"),
    ("independent", [], "network"),
    ("dml", [], "network"),
    ("dml", [], "branch"),
    ("dml", ["method.target=pairwise"], "network"),
    ("dml", ["method.target=pairwise"], "branch"),
    ("cl_ilr", [], "branch"),
    ("cl_ilr", ["method.rescale=false"], "network"),
    ("one", [], "branch"),
    ("okddip", [], "branch"),
    ("okddip", [], "network"),
    ("okddip", ["method.leader=false"], "branch"),
    ("okddip", ["method.attention=false"], "branch"),
    ("okddip", ["method.include_self=false"], "branch"),
    ("okddip", ["method.detach_targets=true"], "branch"),
    ("okddip", ["method.aggregate=probabilities"], "branch"),
    ("okddip", ["method.views=each"], "branch"),
    slow("dml", ["method.views=each", "method.ema_decay=0.9"], "network"),
    ("kdcl", [], "network"),
    ("kdcl", ["method.target=naive"], "branch"),
    slow("kdcl", ["method.target=mean", "method.views=shared"], "network"),
    ("ffl", [], "branch"),
    ("ffl", ["method.peers=3"], "network"),
    slow("ffl", ["method.ensemble_to_fusion=false"], "branch"),
    slow("ffl", ["method.fusion_to_peers=false"], "branch"),
    slow("ffl", ["method.views=each", "method.ema_decay=0.9"], "branch"),
    ("pcl", [], "branch"),
    slow("pcl", ["method.views=shared"], "branch"),
    ("pcl", ["method.ensemble=false"], "network"),
    ("pcl", ["method.mean_teacher=false"], "branch"),
]
every_method_and_structure = pytest.mark.parametrize(("option", "overrides", "structure"), CASES)

# Batch norm subtracts the mean, and with it the bias before it.
WITHOUT_GRADIENT = {"gate.0.bias"}


@cache
def batch() -> tuple[Tensor, Tensor]:
    split = digits(image_size=16).train
    images = split.images[:32].permute(0, 3, 1, 2).float() / 255 - 0.3
    return images, split.labels[:32]


@pytest.fixture
def make_pair(make_method: MakeMethod) -> Callable[..., tuple[PeerGroup, Method]]:
    def make(option: str, *overrides: str) -> tuple[PeerGroup, Method]:
        torch.manual_seed(0)
        method = make_method(option, *overrides)
        make_backbone = partial(resnet, depth=8, num_classes=10, in_channels=1)
        teacher = make_backbone() if option == "kd" else None
        return make_group(make_backbone, method, teacher), method

    return make


def run(group: PeerGroup, method: Method) -> Losses:
    images, labels = batch()
    if method.views > 1:  # of each image as many, each moved by another pixel
        images = torch.stack([images.roll(view, -1) for view in range(method.views)], 1)  # [B, P, C, H, W]
    return method(group(images), labels, torch.tensor(1.0))


@every_method_and_structure
def test_each_part_of_the_loss_falls_when_it_is_optimised_alone(
    make_pair: Callable[..., tuple[PeerGroup, Method]], option: str, overrides: list[str], structure: str
) -> None:
    start = make_pair(option, f"method.structure={structure}", *overrides)
    for part in run(*start).parts:
        group, method = copy.deepcopy(start)
        optimizer = torch.optim.SGD([*group.parameters(), *method.parameters()], lr=0.005)
        values = []
        for _ in range(6):
            value = run(group, method).parts[part]
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
        assert values[-1] < values[0], (part, values)


@every_method_and_structure
def test_every_parameter_gets_a_gradient(
    make_pair: Callable[..., tuple[PeerGroup, Method]], option: str, overrides: list[str], structure: str
) -> None:
    group, method = make_pair(option, f"method.structure={structure}", *overrides)
    run(group, method).total.backward()
    for name, parameter in [*group.named_parameters(), *method.named_parameters()]:
        assert parameter.grad is not None, name
        if name in WITHOUT_GRADIENT:
            assert parameter.grad.abs().max() < 1e-6, name
        else:
            assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("option", ["independent", "dml", "cl_ilr", "one", "okddip", "kdcl", "ffl", "pcl"])
def test_rescaling_divides_the_gradient_of_the_trunk_alone(
    make_pair: Callable[..., tuple[PeerGroup, Method]], option: str
) -> None:
    gradients = []
    for rescale in ("false", "true"):
        overrides = ("method.structure=branch", "method.peers=4", f"method.rescale={rescale}")
        group, method = make_pair(option, *overrides)
        assert group.rescale == (rescale == "true")
        losses = run(group, method)
        # ONE's gate reads the trunk too, beside the branches
        (losses.total if option != "one" else losses.predictions[:4].square().sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in group.named_parameters()})
    plain, rescaled = gradients
    for name, gradient in plain.items():
        factor = 0.25 if name.startswith("trunk.") else 1.0
        torch.testing.assert_close(rescaled[name], factor * gradient, rtol=1e-4, atol=1e-5)


def test_a_teacher_stays_as_it_is_and_is_not_saved_with_the_student(
    make_pair: Callable[..., tuple[PeerGroup, Method]],
) -> None:
    group, method = make_pair("kd", "method.teacher=given")
    [teacher] = group.teacher
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD([*group.parameters(), *method.parameters()], lr=0.1)
    group.train()
    run(group, method).total.backward()
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not teacher.training
    student = {name for name, _ in group.peers[0].named_parameters()}
    assert {name.removeprefix("peers.0.") for name, _ in group.named_parameters()} == student
    assert not any(name.startswith("teacher") for name in group.state_dict())
