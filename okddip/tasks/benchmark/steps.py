"""Training and evaluation step by step, as `Trainer.fit` does them."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from okddip.models.group import PeerGroup
from okddip.run.parts import Parts
from okddip.training import metrics
from okddip.training.epoch import evaluate_on
from okddip.training.precision import PRECISIONS
from okddip.training.trainer import Trainer, own_share


class TrainerSteps:
    """The steps of `Trainer.fit`, each of which can be called by itself."""

    def __init__(self, parts: Parts, *, average: bool = True) -> None:
        """
        Args:
            parts: what is trained.
            average: whether several ranks average their gradients; else each trains on its own.
        """
        self.trainer, self.group, self.method = parts.trainer, parts.group, parts.method
        self.optimizer = parts.optimizer
        device, channels_last = self.trainer.device, self.trainer.channels_last
        self.trainer.set_backend_flags()
        self.forward_pass = forward_pass(self.trainer, self.group)
        share = own_share()
        self.train_one = self.trainer.train_step(
            self.group, self.method, self.optimizer, parts.dataset, average=average
        )
        self.eval_forward = self.trainer.eval_step(self.group, self.method, parts.dataset)
        self.ramp = torch.ones((), device=device)
        loader = parts.dataset.train_loader(
            *(self.trainer.batch_size, device, 0, channels_last, share),
            *(self.trainer.drop_last, self.method.views),
        )
        self.train_batches = endless(loader.batches)
        self.eval_loader = parts.dataset.eval_loader(
            "test", self.trainer.eval_batch_size, device, channels_last, share
        )
        self.eval_batch = next(iter(self.eval_loader.batches()))
        self.sums: metrics.Sums | None = None

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Augmented images [B, C, H, W] and labels [B]."""
        return next(self.train_batches)

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The logits [P, B, K] of a batch of evaluation size, and nothing else."""
        return self.forward_pass(self.eval_batch[0])

    def train_step(self) -> None:
        """The input pipeline, an update of all parameters, the metrics of one batch."""
        self.update(*self.next_batch())

    def update(self, images: Tensor, labels: Tensor) -> None:
        """What a training step does with a batch."""
        self.sums = metrics.accumulate(self.sums, self.train_one(images, labels, self.ramp))

    def evaluate(self) -> dict[str, float]:
        """A whole evaluation: all batches of the test split, and the reading of its metrics."""
        return metrics.read(self.evaluate_batches(self.eval_loader.batches()), self.method)

    def evaluate_batch(self) -> metrics.Sums:
        """The evaluation of one batch."""
        return self.evaluate_batches(iter([self.eval_batch]))

    def evaluate_batches(self, batches: Iterator[tuple[Tensor, Tensor]]) -> metrics.Sums:
        """An evaluation of batches, without the reading of its metrics."""
        return evaluate_on(self.group, self.method, self.eval_forward, batches, self.ramp)


def forward_pass(trainer: Trainer, group: PeerGroup) -> Callable[[Tensor], Tensor]:
    """The forward pass alone, with the trainer's precision and compilation."""
    dtype = PRECISIONS[trainer.precision]

    def forward(images: Tensor) -> Tensor:
        with torch.autocast(trainer.device.type, dtype=dtype, enabled=dtype is not None):
            return group(images).logits

    if trainer.compile:
        return torch.compile(forward, mode=trainer.compile_mode, dynamic=False)
    return forward


def endless(
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of epoch after epoch."""
    epoch = 0
    while True:
        yield from batches(epoch)
        epoch += 1


def uncompiled(trainer: Trainer) -> Trainer:
    """A copy of a trainer that compiles nothing."""
    trainer = copy.copy(trainer)
    trainer.compile = False
    return trainer
