"""Several processes that train one group of peers (torchrun): who is who, and where it matters.

Without torchrun there is one rank, and everything here does nothing. PyTorch is imported where it is used, so
that the program can ask for its rank before it composes a configuration.
"""

from __future__ import annotations

import collections
import datetime
import gc
import io
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from okddip.errors import ConfigError
from okddip.signals import is_stopping

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")

log = logging.getLogger(__name__)

# Longer than a rank needs between two exchanges with the others, where it is not waited for without a limit
# (`_wait_for`); then a rank that hangs ends the run.
TIMEOUT = datetime.timedelta(minutes=10)

# Seconds that a rank waits for its end when another has failed. If it left first, torchrun would end the
# other before its message is out.
PATIENCE = 20.0

# What a process needs of torchrun to be one of several
SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_agents: list[str] = []
_stores: list[torch.distributed.Store] = []  # of this process's group, where a failure is noted
_warnings: list[str] = []  # of this rank, since `pass_on_warnings`
_awaited: collections.Counter[str] = collections.Counter()  # events of `_wait_for`


def rank() -> int:
    """Which of the processes this is; rank 0 alone logs, prints and writes."""
    return int(os.environ.get("RANK", 0)) if ranks() > 1 else 0


def ranks() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def ranks_on_this_machine() -> int:
    """With how many this process shares the cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if ranks() > 1 else 1


def check_environment() -> None:
    """Refuse what some job schedulers leave in the environment, and what would hang.

    Raises:
        ConfigError: names the variables.
    """
    if ranks() == 1:
        return
    if missing := [name for name in SET_BY_TORCHRUN if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE={ranks()}: asks for several processes, but {', '.join(missing)} are not set. Start"
            " with torchrun, which does; or, for one process, unset WORLD_SIZE."
        )
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    agents_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if ranks_on_this_machine() < ranks() and restarts and agents_store:
        raise ConfigError(
            f"--max-restarts={restarts}: on several machines torchrun would give restarted ranks the"
            " addresses of those before, for which they would wait. Set"
            " TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for all, or leave --max-restarts out."
        )


def agents() -> list[str]:
    """The torchrun processes that started the ranks; those that are left are the same after a restart."""
    return _agents or ([_agent()] if "TORCHELASTIC_RUN_ID" in os.environ else [])


def _agent() -> str:
    parent = os.getppid()
    try:  # numbers of processes are used again
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):  # not Linux
        started = ""
    words = [
        "torchrun",
        os.environ.get("TORCHELASTIC_RUN_ID", ""),
        socket.gethostname(),
        str(parent),
        started,
    ]
    return "-".join(words).replace(" ", "_")


def local_rank() -> int:
    """Which of the processes of its machine this is; it takes the CUDA device of that number."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextmanager
def rank_0_speaks() -> Iterator[None]:
    """Until `process_group`, let rank 0 alone say what all would: help, or what is wrong with a command.

    Of what is wrong on another rank only, that one speaks: torchrun would have ended it together with rank 0.
    """
    if rank() == 0:
        yield
        return
    unsaid = io.StringIO()
    sys.stdout = sys.stderr = unsaid
    try:
        yield
    except SystemExit as end:
        if end.code and sys.stderr is unsaid and not is_stopping():
            time.sleep(PATIENCE if local_rank() == 0 else 1.2 * PATIENCE)  # one for each machine
            sys.__stderr__.write(unsaid.getvalue())  # type: ignore[union-attr]
        raise
    finally:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other ranks until the end of the run.

    The first rank to fail raises its error, and torchrun ends all others when that one is gone. Those that
    fail too, because of it or of the same, say nothing.
    """
    if ranks() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    # Its functions take the group that is there when it is first imported for a default argument. Were it
    # this one (DistributedDataParallel imports it), gloo's threads would outlive destroy_process_group, and
    # abort the process now and then, when the interpreter ends.
    import torch.distributed.nn.functional

    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    store, *_ = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # On one machine torchrun keeps the store when it restarts ranks, with the addresses of those before.
        # On several machines, whose counts of restarts differ, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank(), world_size=ranks(), timeout=TIMEOUT)
    _stores.append(store)
    collector = WarningCollector(logging.WARNING)
    program = logging.getLogger("okddip")
    program.addHandler(collector)
    if rank() > 0:
        program.setLevel(logging.WARNING)
    try:
        _agents[:] = sorted(set(_gathered(_agent())))
        yield
        _end_together(store)
    except Exception:
        if note_failure(store) == rank():
            raise
        time.sleep(PATIENCE)
        raise SystemExit(1) from None
    finally:
        program.removeHandler(collector)
    # A model that was trained keeps the group through cycles of references, and its threads with it.
    gc.collect()
    dist.destroy_process_group()


def note_failure(store: torch.distributed.Store) -> int:
    """Write down that this rank failed; returns the rank that was the first to."""
    try:
        return int(store.compare_set("failed_rank", "", str(rank())))
    except (RuntimeError, ValueError):  # the machine that keeps the store is gone
        return rank()


def another_failed() -> bool:
    """Whether another rank was the first to fail: what ends this one then is no signal from outside."""
    if not _stores:
        return False
    store = _stores[-1]
    try:
        return store.check(["failed_rank"]) and int(store.get("failed_rank")) != rank()
    except (RuntimeError, ValueError):
        return True


def _end_together(store: torch.distributed.Store) -> None:
    """Wait for rank 0, which may still upload files, and let it wait until all know that it has done so."""
    if rank() == 0:
        store.add("end", 1)
        _wait_for("end_seen", ranks() - 1)
    else:
        _wait_for("end")
        store.add("end_seen", 1)


def _gathered(value: T) -> list[T]:
    """What each rank gives, in the order of ranks."""
    import torch.distributed as dist

    values: list[Any] = [None] * ranks()
    dist.all_gather_object(values, value)
    return values


def agree(facts: Mapping[str, str]) -> None:
    """See that all ranks have the same facts.

    Raises:
        ConfigError: names the rank and what differs.
    """
    if ranks() == 1:
        return
    first, *others = _gathered(dict(facts))
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
    if ranks() == 1:
        return function()
    import torch
    import torch.distributed as dist

    objects: list[Any] = [None]
    if rank() == 0:
        objects = [function()]
        _stores[-1].add("rank_0", 1)
    _wait_for("rank_0")
    dist.broadcast_object_list(objects, device=torch.device("cpu"))
    return objects[0]


def pass_on_warnings() -> None:
    """Let rank 0 log what other ranks have warned of since the last time, and it has not."""
    if ranks() == 1:
        return
    gathered = _gathered(_warnings)
    if rank() == 0:
        for other, messages in enumerate(gathered):
            for message in messages:
                if message not in gathered[0]:
                    log.warning("Rank %d: %s", other, message)
    _warnings.clear()


class WarningCollector(logging.Handler):
    """Keeps warnings for `pass_on_warnings`; ranks other than the first log nothing."""

    def emit(self, record: logging.LogRecord) -> None:
        _warnings.append(record.getMessage())


def no_bar() -> bool | None:
    """tqdm's `disable`: a bar on rank 0 alone, and there in a terminal alone (None)."""
    return True if rank() > 0 else None


@contextmanager
def first_on_this_machine() -> Iterator[None]:
    """Let one rank of each machine go ahead, which leaves in a cache what the others find there."""
    if ranks() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    machines = torch.tensor(float(local_rank() == 0))
    dist.all_reduce(machines)
    if local_rank() > 0:
        _wait_for("first_of_machine", int(machines))
        yield
    else:
        yield
        _stores[-1].add("first_of_machine", 1)
        _wait_for("first_of_machine", int(machines))


def synchronise(step: nn.Module) -> nn.Module:
    """Let the backward pass of a step average the gradients over ranks."""
    if ranks() == 1:
        return step
    from torch.nn.parallel import DistributedDataParallel

    # Statistics of batch norm are averaged where they are used: `average_buffers`. The setting has another
    # name in newer releases, which PyTorch 2.9 does not know.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return DistributedDataParallel(step, broadcast_buffers=False, gradient_as_bucket_view=True)


def is_synchronised(step: nn.Module) -> bool:
    """Whether `synchronise` made it for several ranks."""
    return hasattr(step, "no_sync")


def unsynchronised(step: nn.Module) -> AbstractContextManager[None]:
    """Within, gradients are added up on their rank and wait for the next synchronised backward pass."""
    return getattr(step, "no_sync", nullcontext)()


def weight_of_share(images: int, device: torch.device) -> Tensor:
    """What the mean loss of this rank's images counts in the mean over ranks that `synchronise` takes.

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
    return images * ranks() / in_batch.clamp_min(1)


def sum_over_ranks(sums: dict[str, Tensor]) -> None:
    """Replace each tensor by its sum over all ranks."""
    if ranks() == 1:
        return
    import torch.distributed as dist

    for value in sums.values():
        dist.all_reduce(value)


def average_buffers(*modules: nn.Module) -> None:
    """Replace running statistics, of which each rank saw its share of the images, by their mean."""
    if ranks() == 1:
        return
    import torch.distributed as dist

    for module in modules:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= ranks()


def _wait_for(event: str, times: int = 1) -> None:
    """Wait for what other ranks announce so many times in the store, each time all ranks come here.

    However long: rank 0 may wait for a teacher that another process trains, or decode a large data set.
    """
    _awaited[event] += times
    while _stores[-1].add(event, 0) < _awaited[event]:
        if another_failed():
            raise RuntimeError("Another rank has failed.")
        time.sleep(0.05)
