"""Losses over stacks of peers: batch means, summed over peers, one batched call each."""

import math

import torch.nn.functional as F
from torch import Tensor


def hard_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the labels, batch mean, summed over peers.

    Args:
        logits: [P, B, K].
        labels: [B], class indices.
    """
    peers, batch, _ = logits.shape
    total = F.cross_entropy(logits.flatten(0, 1), labels.repeat(peers), reduction="sum")
    return total / max(batch, 1)  # 0 for a rank's empty share of a batch


def soft_loss(logits: Tensor, log_targets: Tensor, temperature: float, kind: str = "kl") -> Tensor:
    """What softened predictions cost against soft targets: T^2 times the batch mean, summed over peers.

    The factor T^2 keeps gradients at the scale of the hard loss (Hinton et al. 2015, section 2). Working on
    logarithms needs no epsilon inside the logarithm, where the authors add 1e-7 (utils.py, `KL_Loss`).

    Args:
        logits: [..., B, K], of those who learn.
        log_targets: [..., B, K], log-probabilities of the targets at the same temperature.
        kind: `kl`, the divergence of the predictions from the targets, or `ce`, the cross-entropy, which
            differs by the targets' entropy (the authors' `--loss`).
    """
    log_predictions = F.log_softmax(logits / temperature, dim=-1)  # [..., B, K]
    if kind == "kl":
        cost = F.kl_div(log_predictions, log_targets, reduction="sum", log_target=True)
    else:
        cost = -(log_targets.exp() * log_predictions).sum()
    return cost * (temperature**2 / max(logits.shape[-2], 1))


def log_softened(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities at a temperature: the form in which `soft_loss` takes its targets. Same shape."""
    return F.log_softmax(logits / temperature, dim=-1)


def mean_of_others(logits: Tensor) -> Tensor:
    """For each peer the mean of all the other peers' logits, [P, B, K] to [P, B, K]."""
    return (logits.sum(0, keepdim=True) - logits) / (logits.shape[0] - 1)


def ramp_weight(epoch: float, length: float) -> float:
    """Weight of the distillation terms, exp(-5 (1 - e/L)^2) and then 1 (Laine and Aila 2017, section 3).

    Args:
        epoch: 0-based.
        length: epochs until the weight is 1; 0 for a weight of 1 from the start.
    """
    if epoch >= length:
        return 1.0
    return math.exp(-5.0 * (1 - epoch / length) ** 2)
