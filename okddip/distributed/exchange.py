"""Values that ranks exchange, and what one rank does before the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from okddip.distributed.environment import local_rank, rank, world_size
from okddip.distributed.store import group_store
from okddip.errors import ConfigError

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """The value of each rank, in the order of ranks."""
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def check_ranks_agree(facts: Mapping[str, str]) -> None:
    """Check that all ranks have the same facts.

    Raises:
        ConfigError: names the rank and what differs.
    """
    if world_size() == 1:
        return
    first, *others = gather(dict(facts))
    for number, theirs in enumerate(others, 1):
        different = [
            f"{key} is {theirs.get(key, 'absent')} there and {first.get(key, 'absent')} on rank 0"
            for key in sorted(first.keys() | theirs.keys())
            if first.get(key) != theirs.get(key)
        ]
        if different:
            raise ConfigError(
                f"Rank {number} would train another run than rank 0: {'; '.join(different)}. Start all with"
                " the same command, on the same code and the same data."
            )


def from_rank_0(function: Callable[[], T]) -> T:
    """Call a function on rank 0 alone, and give all ranks what it returns."""
    if world_size() == 1:
        return function()
    import torch
    import torch.distributed as dist

    objects: list[Any] = [None]
    if rank() == 0:
        objects = [function()]
        group_store().announce("rank_0")
    group_store().wait_for("rank_0")
    dist.broadcast_object_list(objects, device=torch.device("cpu"))
    return objects[0]


@contextmanager
def local_rank_0_first() -> Iterator[None]:
    """Let one rank of each machine go first: it fills a cache in which the others find what they need."""
    if world_size() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    machines = torch.tensor(float(local_rank() == 0))
    dist.all_reduce(machines)
    if local_rank() == 0:
        yield
        group_store().announce("local_rank_0")
    group_store().wait_for("local_rank_0", int(machines))
    if local_rank() > 0:
        yield


def end_together() -> None:
    """Wait for rank 0, which may still upload files, and let it wait until all know that it has done so."""
    if rank() == 0:
        group_store().announce("end")
        group_store().wait_for("end_seen", world_size() - 1)
    else:
        group_store().wait_for("end")
        group_store().announce("end_seen")
