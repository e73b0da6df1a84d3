"""One pass over the batches of a data set, to learn from them or to be measured."""

from collections.abc import Iterable

import torch
from torch import Tensor

from okddip import distributed
from okddip.errors import ConfigError
from okddip.methods.base import Method
from okddip.models.group import PeerGroup
from okddip.signals import raise_if_stopping
from okddip.training import metrics
from okddip.training.step import EvalStep, TrainStep

# A loss that is not finite stops the run, but not by a wait for the device: what is looked at was sent by the
# device so many steps before.
STEPS_BETWEEN_CHECKS = 50


def train_on(
    group: PeerGroup,
    method: Method,
    step: TrainStep,
    batches: Iterable[tuple[Tensor, Tensor]],
    ramp: Tensor,
    epoch: int,
) -> metrics.Sums:
    """An update for each batch; results are read back from the device every `STEPS_BETWEEN_CHECKS`.

    Returns:
        Sums over the batches, the shares of all ranks together.
    """
    group.train()
    method.train()
    sums = broken = None
    for number, (images, labels) in enumerate(batches, 1):
        raise_if_stopping()
        sums = metrics.accumulate(sums, step(images, labels, ramp))
        if number % STEPS_BETWEEN_CHECKS == 0:
            if broken is not None:
                refuse_broken_losses({**sums, "broken": broken()}, epoch)
            broken = metrics.sent_to_host(sums["broken"])
    if sums is None:
        raise ConfigError("The training set gives no batch: it needs at least two images that can be read.")
    distributed.sum_over_ranks(sums)
    refuse_broken_losses(sums, epoch)
    return sums


@torch.no_grad()
def evaluate_on(
    group: PeerGroup,
    method: Method,
    step: EvalStep,
    batches: Iterable[tuple[Tensor, Tensor]],
    ramp: Tensor,
) -> metrics.Sums:
    """One pass over the batches of a split; no batch's results are read back from the device.

    Returns:
        Sums over the split, the shares of all ranks together.
    """
    group.eval()
    method.eval()
    sums = None
    for images, labels in batches:
        raise_if_stopping()
        _, batch_sums = step(images, labels, ramp)
        sums = metrics.accumulate(sums, batch_sums)
    if sums is None:
        raise ConfigError("A split has no image that can be read, so there is nothing to evaluate on.")
    distributed.sum_over_ranks(sums)
    return sums


def refuse_broken_losses(sums: metrics.Sums, epoch: int) -> None:
    """Stop a run whose losses are not finite; waits for the device.

    Raises:
        ConfigError: names the losses and the epoch.
    """
    if broken := metrics.broken_losses(sums):
        raise ConfigError(
            f"Epoch {epoch + 1}: {', '.join(broken)} is not finite. A lower optimizer.lr,"
            " scheduler.warmup_epochs or trainer.gradient_clip may help. The last checkpoint, if there is"
            " one, is of an epoch before."
        )
