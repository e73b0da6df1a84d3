"""The process group: ranks join it, train, and end together."""

from __future__ import annotations

import datetime
import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from okddip.distributed import output
from okddip.distributed.environment import rank, torchrun_agent, world_size
from okddip.distributed.exchange import end_together, gather
from okddip.distributed.store import join

# More than a rank needs between two exchanges with the others (`GroupStore.wait_for` has no limit); a rank
# that hangs for longer ends the run
TIMEOUT = datetime.timedelta(minutes=10)


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other ranks until the end of the run.

    The first rank to fail raises its error, and torchrun ends all others when that one is gone. Those that
    fail too, because of it or for the same reason, print nothing.
    """
    if world_size() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    # Functions there have the group that exists at their first import as default argument. Were it this one
    # (DistributedDataParallel imports them), gloo's threads would outlive destroy_process_group, and now and
    # then abort the process when the interpreter ends.
    import torch.distributed.nn.functional

    output.restore_output()
    store, *_ = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # On one machine torchrun keeps the store when it restarts ranks, with the previous ones' addresses.
        # On several machines, whose counts of restarts differ, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=TIMEOUT)
    group = join(store)
    try:
        with output.collected_warnings():
            group.agents = sorted(set(gather(torchrun_agent())))
            yield
            end_together()
    except Exception:
        if group.record_failure() == rank():
            raise
        time.sleep(output.SECONDS_BEFORE_EXIT)
        raise SystemExit(1) from None
    # A trained model keeps the group alive through reference cycles, and its threads with it.
    gc.collect()
    dist.destroy_process_group()
