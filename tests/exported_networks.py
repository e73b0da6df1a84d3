"""Checkpoints and exports of small networks, as if they had been trained."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import okddip as package
from okddip.assembly import make
from okddip.deployment.predictors import rebuild
from okddip.models.group import PeerGroup
from okddip.training import checkpoint
from okddip.trust import Trust

Okddip = Callable[..., Any]  # the fixture `okddip`
Trained = Callable[..., dict[str, Any]]
MEAN, STD = 0.3, 0.4


@pytest.fixture
def trained(configured: Callable[..., DictConfig]) -> Trained:
    """Write run/last.pt, of the digits, with statistics as if trained; returns what it holds."""

    def write(*overrides: str, scores: dict[str, float] | None = None) -> dict[str, Any]:
        config = configured("dataset=digits", "model=resnet8", *overrides)
        OmegaConf.resolve(config)
        make_backbone = partial(make, "model", config.model, num_classes=10, in_channels=1)
        method = make("method", config.method, feature_dim=64, trunk_channels=32, epochs=300)
        group = PeerGroup(make_backbone, method.peers, method.structure, method.rescale)
        randomize_statistics(group)
        state = {
            "version": package.__version__,
            "config": OmegaConf.to_container(config),
            "classes": [f"digit {digit}" for digit in range(10)],
            "channels": 1,
            "image_size": [16, 16],
            "mean": [MEAN],
            "std": [STD],
            "epoch": 7,
            "history": {"last": {"epoch": 7, **(scores or {})}},
            "group": group.state_dict(),
            "method": method.state_dict(),
        }
        Path("run").mkdir(exist_ok=True)
        checkpoint.save(state, Path("run"), best=True)
        return state

    return write


def randomize_statistics(module: nn.Module) -> None:
    """As training would have left them: else batch norm is the identity."""
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)


def logits_in_training(state: dict[str, Any], images: Tensor) -> Tensor:
    """Of all peers, [P, B, K], by the group that was trained."""
    group, _ = rebuild(state, Trust(), "run")
    group.eval()
    with torch.no_grad():
        return group(images).logits


def normalised(pixels: Tensor) -> Tensor:
    return (pixels.permute(0, 3, 1, 2) / 255 - MEAN) / STD


@pytest.fixture
def exported(okddip: Okddip, trained: Trained) -> Path:
    trained()
    okddip("task=export", "checkpoint=run", "export.formats=[safetensors]", "export.out=out")
    return Path("out")
