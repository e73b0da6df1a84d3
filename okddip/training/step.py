"""One batch: the forward pass with its losses and metrics, and the update of all parameters."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from okddip import distributed
from okddip.methods.base import Method
from okddip.models.group import PeerGroup
from okddip.training import metrics


class ForwardStep(nn.Module):
    """The forward pass, the losses and the metrics of one batch, compiled if the settings say so.

    Args:
        group, method: whose parameters are learned.
        images: of a full batch. Another, such as the last one of an epoch, runs uncompiled rather than being
            compiled for its size.
        device, dtype: of autocast; no dtype for none.
        auxiliary: see `metrics.count`.
        compile_mode: None for not compiled.
    """

    def __init__(
        self,
        group: PeerGroup,
        method: Method,
        *,
        images: int,
        device: str,
        dtype: torch.dtype | None,
        auxiliary: int | None,
        compile_mode: str | None,
    ) -> None:
        super().__init__()
        self.group = group
        self.method = method
        self.device = device
        self.dtype = dtype
        self.auxiliary = auxiliary
        self.compiled = compile_mode and torch.compile(self.step, mode=compile_mode, dynamic=False)
        self.images = images

    def forward(self, images: Tensor, labels: Tensor, ramp: Tensor) -> tuple[Tensor, metrics.Sums]:
        """Map a batch to the loss, 0-dim, and sums over the batch.

        Args:
            images: [B, C, H, W], or a view for each peer [B, P, C, H, W].
            labels: [B].
            ramp: 0-dim.
        """
        step = self.compiled if self.compiled and 0 < len(images) == self.images else self.step
        return step(images, labels, ramp)

    def step(self, images: Tensor, labels: Tensor, ramp: Tensor) -> tuple[Tensor, metrics.Sums]:
        # without images SyncBatchNorm sends zeros of its input's type, where the other ranks send fp32
        autocast = self.dtype is not None and len(images) > 0
        with torch.autocast(self.device, dtype=self.dtype, enabled=autocast):
            output = self.group(images)
        losses = self.method(output, labels, ramp)
        return losses.total, metrics.count(losses, labels, self.auxiliary)


class TrainStep:
    """One update of all parameters; reads nothing back from the device.

    Args:
        forward: a `ForwardStep`; the gradients of several ranks are averaged.
        optimizer: of its parameters.
        scaler: of the loss, for fp16.
        accumulate: in how many parts a batch is taken, one after the other.
        gradient_clip: largest norm of the gradient of all parameters; None for any.
        after_step: is called after each update.
    """

    def __init__(
        self,
        forward: nn.Module,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        *,
        accumulate: int,
        gradient_clip: float | None,
        after_step: Callable[[], None],
    ) -> None:
        self.forward = forward
        self.optimizer = optimizer
        self.scaler = scaler
        self.accumulate = accumulate
        self.gradient_clip = gradient_clip
        self.after_step = after_step

    def __call__(self, images: Tensor, labels: Tensor, ramp: Tensor) -> metrics.Sums:
        """Learn from a batch.

        Args:
            images: this rank's share of a batch [B, C, H, W].
            labels: [B].
            ramp: 0-dim.

        Returns:
            Sums over the share.
        """
        parts = parts_of(len(labels), self.accumulate)
        if parts == 1 and not distributed.is_data_parallel(self.forward):
            loss, sums = self.forward(images, labels, ramp)
            self.scaler.scale(loss).backward()
        else:
            sums = self.backward_in_parts(images, labels, ramp, parts)
        if self.gradient_clip is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.after_step()
        self.optimizer.zero_grad(set_to_none=True)
        return sums

    def backward_in_parts(self, images: Tensor, labels: Tensor, ramp: Tensor, parts: int) -> metrics.Sums:
        """The gradient of a batch of which each rank has a share, and takes it in so many parts.

        Each part's mean loss is weighted by its images, so that the gradient is that of the whole batch.
        """
        weight: Tensor | float = 1 / max(len(labels), 1)
        if distributed.is_data_parallel(self.forward):
            weight = weight * distributed.weight_of_share(len(labels), images.device)
        chunks = list(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True))
        sums = None
        for number, (some_images, some_labels) in enumerate(chunks, 1):
            with distributed.no_sync(self.forward) if number < parts else nullcontext():
                loss, chunk_sums = self.forward(some_images, some_labels, ramp)
                self.scaler.scale(loss * (weight * len(some_labels))).backward()
            sums = metrics.accumulate(sums, chunk_sums)
        assert sums is not None
        return sums


EvalStep = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, metrics.Sums]]


def parts_of(images: int, accumulate: int) -> int:
    """In how many parts images are taken: of two at least, as batch norm cannot normalise a single value."""
    return max(1, min(accumulate, images // 2))
