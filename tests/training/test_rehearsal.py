"""One batch before a run begins: it finds what cannot work, and leaves no trace."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Answer, quick_first
from omegaconf import DictConfig
from torch import Tensor, nn

from okddip.checks import check
from okddip.errors import ConfigError, Incompatible
from okddip.main import build
from okddip.methods.base import Losses, Method, with_ensemble
from okddip.methods.losses import hard_loss
from okddip.models.backbone import Backbone
from okddip.models.group import PeerGroup
from okddip.models.resnet import resnet
from okddip.outputs import GroupOutput
from okddip.training.peers import make_group
from okddip.training.rehearsal import rehearse

DIGITS = ("dataset=digits", "tracking=none")


@pytest.mark.parametrize(
    ("name", "split", "size"),
    [
        ("alexnet", "features.5", 16),
        pytest.param("densenet121", "features.transition2", 8, marks=pytest.mark.slow),
        pytest.param("maxvit_t", "blocks.2", 16, marks=pytest.mark.slow),
    ],
)
def test_a_model_for_larger_images_is_refused_before_the_run(
    okddip: Callable[..., Answer], name: str, split: str, size: int
) -> None:
    model = ("model=torchvision", f"model.name={name}", f"model.split={split}")
    answer = okddip(*DIGITS, *model, f"dataset.image_size={size}", "method=baseline")
    assert answer.code == 1
    message = (
        f"model=torchvision ({name}) with dataset=digits: the model cannot take images of 1x{size}x{size}"
    )
    assert message in answer.err
    assert "Traceback" not in answer.err  # nor one of torch.fx
    assert "forward" not in answer.err
    assert "epoch" not in answer.out


@pytest.mark.parametrize("method", quick_first("okddip", "one", "dml", "baseline"))
def test_nothing_is_left_of_it(configured: Callable[..., DictConfig], method: str) -> None:
    config = configured(*DIGITS, f"method={method}", "model=densenet40_12", "model.dropout=0.2")
    check(config)
    parts = build(config)
    before = {name: tensor.clone() for name, tensor in tensors(parts.group, parts.method).items()}
    random = torch.get_rng_state()
    modes = [module.training for module in (*parts.group.modules(), *parts.method.modules())]
    rehearse(parts.group, parts.method, (1, 16, 16), "")
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for module in (*parts.group.modules(), *parts.method.modules())]
    after = tensors(parts.group, parts.method)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in parts.group.parameters())


class Miscounts(Method):
    """Returns the logits of the peers alone, and names the ensemble too."""

    def losses(self, output: GroupOutput, labels: Tensor, ramp: Tensor) -> Losses:
        return Losses(hard_loss(output.logits, labels), {}, output.logits)


@pytest.mark.parametrize("needs_averages", [False, True])
def test_predictions_that_are_not_those_that_are_named_are_refused(
    monkeypatch: pytest.MonkeyPatch, needs_averages: bool
) -> None:
    monkeypatch.setattr(Miscounts, "needs_averages", needs_averages)
    method = Miscounts(
        peers=2, structure="branch", feature_dim=64, trunk_channels=32, epochs=2, ema_decay=0.9
    )
    group = make_group(partial(resnet, depth=8, num_classes=10, in_channels=1), method)
    found, named = (4, 5) if needs_averages else (2, 3)
    message = rf"Miscounts.losses returns the predictions of {found} .* are {named}: peer0"
    with pytest.raises(ConfigError, match=message):
        rehearse(group, method, (1, 16, 16), "")


def test_a_view_for_each_peer_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(self: Method, output: GroupOutput, labels: Tensor, ramp: Tensor) -> Losses:
        assert output.teacher is not None
        assert output.teacher.shape == (2, 10)
        return Losses(hard_loss(output.logits, labels), {}, with_ensemble(output.logits, 2))

    monkeypatch.setattr(Miscounts, "losses", losses)
    method = Miscounts(peers=2, structure="branch", feature_dim=64, trunk_channels=32, epochs=2, views="each")
    make_backbone = partial(resnet, depth=8, num_classes=10, in_channels=1)
    group = make_group(make_backbone, method, make_backbone())
    rehearse(group, method, (1, 16, 16), "")
    views = torch.randn(3, 2, 1, 16, 16)
    assert torch.equal(group.eval()(views).teacher, group.teacher[0](views[:, 0]))


def tensors(group: PeerGroup, method: Method) -> dict[str, Tensor]:
    return {
        f"{part} {name}": tensor
        for part, module in (("group", group), ("method", method))
        for name, tensor in module.state_dict().items()
    }


class Moody(nn.Module):
    """Reads a number on the host, which the meta device cannot; and takes no images below 12 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, images: Tensor) -> Tensor:
        if self.norm(images).sum().item() > 1e9 or images.shape[-1] < 12:
            raise ValueError("not in the mood")
        torch.rand(1)
        return images


def test_a_model_that_reads_numbers_is_run_for_real(make_method: Callable[..., Any]) -> None:
    def moody() -> Backbone:
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 8))
        return Backbone(Moody(), head, nn.Linear(8, 4), feature_dim=8, trunk_channels=1)

    method = make_method("one", "method.peers=2", feature_dim=8, trunk_channels=1)
    group = PeerGroup(moody, 2)
    random = torch.get_rng_state()
    rehearse(group, method, (1, 16, 16), "")
    with pytest.raises(Incompatible, match=r"^mine: the model cannot take images of 1x8x8 \(not in the mood"):
        rehearse(group, method, (1, 8, 8), "mine")
    assert torch.equal(random, torch.get_rng_state())
    assert group.trunk.norm.num_batches_tracked == 0  # type: ignore[union-attr]


def test_it_costs_no_arithmetic(configured: Callable[..., DictConfig], monkeypatch: Any) -> None:
    config = configured(*DIGITS, "model=resnet8")
    check(config)
    parts = build(config)
    devices = set()
    forward = PeerGroup.forward

    def watched(group: PeerGroup, images: Tensor) -> Any:
        devices.add(images.device.type)
        return forward(group, images)

    monkeypatch.setattr(PeerGroup, "forward", watched)
    rehearse(parts.group, parts.method, (1, 16, 16), "")
    assert devices == {"meta"}
