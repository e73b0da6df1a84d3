"""Ending a run in good order when it is asked to end: Ctrl-C, Slurm's preemption, a time limit."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Slurm sends SIGTERM at the end, and SIGUSR1 or SIGUSR2 ahead of it where it is asked to
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Stop:
    """Whether the process was asked to stop, and whether it may just now."""

    may_stop = True
    asked_by: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let signals raise SystemExit, with the exit code that shells give to signals.

    No `except Exception` on the way holds that up. Where a launcher has a handler of its own (submitit
    requeues the job), that one decides how the process ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)
    try:
        yield
    finally:
        Stop.asked_by = None
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(number: int, frame: FrameType | None) -> None:
    """Raise SystemExit, now or as soon as the process may stop."""
    if Stop.asked_by is None:  # one is enough: what follows takes seconds
        Stop.asked_by = number
        if Stop.may_stop:
            raise SystemExit(128 + number)


@contextmanager
def unstopped() -> Iterator[None]:
    """Finish what must not be left half done, such as a transaction, before a signal ends the run."""
    Stop.may_stop = False
    try:
        yield
    finally:
        Stop.may_stop = True
    if Stop.asked_by is not None:
        raise SystemExit(128 + Stop.asked_by)
