"""What is averaged or summed over ranks: gradients, buffers, metrics."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from okddip.distributed.environment import world_size

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def data_parallel(step: nn.Module) -> nn.Module:
    """Let the backward pass of a step average the gradients over ranks."""
    if world_size() == 1:
        return step
    from torch.nn.parallel import DistributedDataParallel

    # Statistics of batch norm are averaged where they are used: `average_buffers`. The setting has another
    # name in newer releases, which PyTorch 2.9 does not know.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return DistributedDataParallel(step, broadcast_buffers=False, gradient_as_bucket_view=True)


def is_data_parallel(step: nn.Module) -> bool:
    """Whether `data_parallel` wrapped the step for several ranks."""
    return hasattr(step, "no_sync")


def no_sync(step: nn.Module) -> AbstractContextManager[None]:
    """Within, gradients accumulate on their rank; the next backward pass outside averages their sum."""
    return getattr(step, "no_sync", nullcontext)()


def weight_of_share(images: int, device: torch.device) -> Tensor:
    """The weight of this rank's mean loss in the mean over ranks that `data_parallel` takes.

    Args:
        images: how many of the batch's images this rank has, possibly none.
        device: of the result.

    Returns:
        1 where all ranks have as many images, 0-dim.
    """
    import torch
    import torch.distributed as dist

    in_batch = torch.full((), float(images), device=device)
    dist.all_reduce(in_batch)
    return images * world_size() / in_batch.clamp_min(1)


def sum_over_ranks(sums: dict[str, Tensor]) -> None:
    """Replace each tensor by its sum over all ranks."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    for value in sums.values():
        dist.all_reduce(value)


def average_buffers(*modules: nn.Module) -> None:
    """Replace running statistics, of which each rank saw its share of the images, by their mean."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    for module in modules:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= world_size()
