from collections.abc import Callable

import pytest
import torch

from okddip.methods.base import Method
from okddip.methods.losses import log_softened, ramp_weight, soft_loss
from okddip.outputs import GroupOutput

METHODS = {
    "okddip": [],
    "dml": [],
    "dml pairwise": ["method.target=pairwise"],
    "cl_ilr": [],
    "one": [],
    "kdcl": [],
    "kdcl naive": ["method.target=naive"],
    "ffl": [],
    "pcl": [],
}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_of_nearly_equal_predictions_is_not_negative(scale: float, dtype: torch.dtype) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logits = scale * torch.randn(4, 128, 100, generator=generator).to(dtype)
        nearly = logits * (1 + 1e-3 * torch.randn(logits.shape, generator=generator)).to(dtype)
        value = soft_loss(nearly.float(), log_softened(logits.float(), 3.0), 3.0)
        assert value.item() >= -1e-6


@pytest.mark.parametrize("name", METHODS)
def test_under_autocast_losses_stay_in_single_precision_and_divergences_positive(
    make_method: Callable[..., Method], name: str
) -> None:
    method = make_method(name.split()[0], "method.peers=4", *METHODS[name])
    same = torch.randn(1, 16, 10, dtype=torch.bfloat16)
    logits = same + 1e-2 * torch.randn(4, 16, 10, dtype=torch.bfloat16)
    features = torch.randn(4, 16, 64, dtype=torch.bfloat16)
    trunk = torch.randn(16, 32, 4, 4, dtype=torch.bfloat16)
    averages = logits + 1e-2 * torch.randn_like(logits) if method.needs_averages else None
    maps = torch.randn(4, 16, 64, 4, 4, dtype=torch.bfloat16)
    output = GroupOutput(logits, features, trunk, averages=averages, maps=maps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = method(output, torch.randint(10, (16,)), torch.tensor(1.0))
    soft = [value for part, value in losses.parts.items() if part != "hard"]
    assert losses.predictions.dtype == losses.total.dtype == torch.float32
    assert soft
    for value in soft:
        assert value.dtype == torch.float32
        assert value.item() >= -1e-6


def test_cross_entropy_is_divergence_plus_entropy_of_the_targets() -> None:
    logits, targets = torch.randn(2, 3, 8, 10)
    log_targets = log_softened(targets, 3.0)
    entropy = -(log_targets.exp() * log_targets).sum() * 9 / 8
    divergence = soft_loss(logits, log_targets, 3.0, "kl")
    torch.testing.assert_close(soft_loss(logits, log_targets, 3.0, "ce"), divergence + entropy)


def test_without_a_length_the_ramp_is_one_from_the_start() -> None:
    assert ramp_weight(0, 0) == 1
