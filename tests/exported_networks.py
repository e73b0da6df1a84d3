"""Checkpoints and exports of small networks, as if they had been trained."""

import copy
import shutil
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
from okddip.training import checkpoint
from okddip.training.peers import make_group, saved_parts
from okddip.trust import Trust

Okddip = Callable[..., Any]  # the fixture `okddip`
Trained = Callable[..., dict[str, Any]]
MEAN, STD = 0.3, 0.4


@pytest.fixture
def trained(configured: Callable[..., DictConfig]) -> Trained:
    """Write run/last.pt, of the digits, with statistics as if trained; returns what it holds."""

    def write(*overrides: str, scores: dict[str, float] | None = None) -> dict[str, Any]:
        if overrides not in STATES:
            STATES[overrides] = trained_state(configured("dataset=digits", "model=resnet8", *overrides))
        state = copy.deepcopy(STATES[overrides])
        state["history"] = {"last": {"epoch": 7, **(scores or {})}}
        Path("run").mkdir(exist_ok=True)
        checkpoint.save(state, Path("run"), best=True)
        return state

    return write


STATES: dict[tuple[str, ...], dict[str, Any]] = {}  # what `trained` has made, by the overrides


def trained_state(config: DictConfig) -> dict[str, Any]:
    OmegaConf.resolve(config)
    make_backbone = partial(make, "model", config.model, num_classes=10, in_channels=1)
    method = make("method", config.method, feature_dim=64, trunk_channels=32, epochs=300)
    method.prepare(10)
    group = make_group(make_backbone, method)
    randomize_statistics(group)
    for averages in group.averages:
        randomize_statistics(averages)
    return {
        "version": package.__version__,
        "config": OmegaConf.to_container(config),
        "classes": [f"digit {digit}" for digit in range(10)],
        "channels": 1,
        "image_size": [16, 16],
        "mean": [MEAN],
        "std": [STD],
        "epoch": 7,
        **{name: part.state_dict() for name, part in saved_parts(group, method).items()},
    }


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
def exported(okddip: Okddip, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of an export, in `out`, and of its run; a session makes it once."""
    made = tmp_path_factory.getbasetemp() / "exported"
    if not made.exists():
        trained()
        okddip("task=export", "checkpoint=run", "export.formats=[safetensors]", "export.out=out")
        for folder in ("run", "out"):
            shutil.copytree(folder, made / folder)
    shutil.copytree(made, Path(), dirs_exist_ok=True)
    return Path("out")
