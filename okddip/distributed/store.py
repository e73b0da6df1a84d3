"""What ranks tell each other in torchrun's key-value store: events to wait for, and who failed first."""

from __future__ import annotations

import collections
import os
import time
from typing import TYPE_CHECKING

from okddip.distributed.environment import rank, torchrun_agent

if TYPE_CHECKING:
    from torch.distributed import Store


class GroupStore:
    """The store of this process's group.

    Attributes:
        agents: the torchrun processes that started the ranks.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.agents: list[str] = []
        self.awaited: collections.Counter[str] = collections.Counter()  # how often, by event

    def announce(self, event: str) -> None:
        """Let other ranks' `wait_for` go on."""
        self.store.add(event, 1)

    def wait_for(self, event: str, announcements: int = 1) -> None:
        """Wait until an event has been announced so many more times.

        There is no time limit: rank 0 may wait for a teacher that another process trains, or decode a large
        data set.

        Raises:
            RuntimeError: another rank has failed.
        """
        self.awaited[event] += announcements
        while self.store.add(event, 0) < self.awaited[event]:
            if self.another_failed():
                raise RuntimeError("Another rank has failed.")
            time.sleep(0.05)

    def record_failure(self) -> int:
        """Record that this rank failed; returns the rank that failed first."""
        try:
            return int(self.store.compare_set("failed_rank", "", str(rank())))
        except (RuntimeError, ValueError):  # the machine that keeps the store is gone
            return rank()

    def another_failed(self) -> bool:
        """Whether another rank was the first to fail."""
        try:
            return self.store.check(["failed_rank"]) and int(self.store.get("failed_rank")) != rank()
        except (RuntimeError, ValueError):
            return True


_joined: list[GroupStore] = []  # of this process's group, once it has joined one


def join(store: Store) -> GroupStore:
    """Use a store for the group that this process joins."""
    _joined[:] = [GroupStore(store)]
    return group_store()


def group_store() -> GroupStore:
    """The store of the group that this process has joined."""
    return _joined[0]


def another_failed() -> bool:
    """Whether another rank was the first to fail: then no signal from outside ended this one."""
    return bool(_joined) and group_store().another_failed()


def torchrun_agents() -> list[str]:
    """The torchrun processes that started the ranks; those that are left are the same after a restart."""
    if _joined:
        return group_store().agents
    return [torchrun_agent()] if "TORCHELASTIC_RUN_ID" in os.environ else []
