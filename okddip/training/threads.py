"""How many threads of the CPU a run computes with.

The count decides the last bits of sums that threads share, so it is part of what repeats a run exactly, and
a resumed run takes the count that it began with. By default it follows from the size of the network and from
the machine alone, not from what else the machine does at that moment, which would be another count each time.

Threads that wait for each other in a loop (OpenMP's way, unless told otherwise) make a run many times slower
as soon as another process wants one of the cores. So `okddip` sets `OMP_WAIT_POLICY=PASSIVE`, and a step that
is too small to gain from more threads has one.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from okddip.models.group import PeerGroup
from okddip.training.rehearsal import BATCH, copy_to_meta_device

MOST_THREADS = 1024
VARIABLE = "OMP_NUM_THREADS"
# Operations of a training step that are worth another thread. Two threads that wait passively take 1.5 times
# the CPU time of one in a step of 2 GFLOP (OKDDip, ResNet-8, digits), and 1.1 times in one of 10 GFLOP (the
# baseline, ResNet-8, CIFAR-10).
FLOPS_A_THREAD = 4e9


def default_threads(count_flops: Callable[[], float | None], *, side_by_side: bool = False) -> int:
    """The number of threads of a run that names none.

    Args:
        count_flops: the floating-point operations of a training step; None if they cannot be counted.
        side_by_side: whether it is one of several jobs that share the machine.
    """
    if side_by_side:
        return 1
    most = torch.get_num_threads()  # by what cores there are, or as the variable says
    if most == 1 or VARIABLE in os.environ or (flops := count_flops()) is None:
        return most
    return max(1, min(most, int(flops / FLOPS_A_THREAD)))


def step_flops(group: PeerGroup, shape: tuple[int, int, int], images: int) -> float | None:
    """Floating-point operations of a training step: those of the forward pass, and twice as many backward.

    Counted on the meta device, which knows shapes and calculates nothing.

    Args:
        group: left as it is.
        shape: (C, H, W) of the images.
        images: of a batch.

    Returns:
        None if the model has code that the meta device cannot run.
    """
    try:
        with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
            copy_to_meta_device(group).train()(torch.zeros(BATCH, *shape))
    except Exception:  # a model's own code may raise anything
        return None
    return 3 * counter.get_total_flops() * images / BATCH


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """Let PyTorch compute with so many threads; afterwards with as many as before. None leaves them."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
