"""Ending a run in good order when it is asked to end: Ctrl-C, Slurm's preemption, a time limit."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ClassVar

# Slurm sends SIGTERM at the end, and SIGUSR1 or SIGUSR2 ahead of it where it is asked to; a terminal that
# is closed sends SIGHUP
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


# Seconds after a request to stop in which others are the same
SAME_REQUEST = 2.0


class Stop:
    """What became of a request to stop."""

    end: BaseException | None = None  # what the process ends with, once it was asked to
    raised = 0.0  # when it was last told
    may_stop = True  # just now
    waiting: int | None = None  # a signal that came when it might not
    # handlers that were there before
    launchers: ClassVar[dict[int, Callable[[int, FrameType | None], object]]] = {}


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let signals raise SystemExit, with the exit code that shells give to signals.

    No `except Exception` on the way holds that up. Where a launcher has a handler of its own (submitit
    requeues the job), that one decides how the process ends. An exception after a request to stop is taken
    for a consequence of it: the signal may have reached others that the process depends on.
    """
    main = threading.current_thread() is threading.main_thread()  # which alone may handle signals
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS} if main else {}
    ours = [number for number, handler in before.items() if handler not in (stop, signal.SIG_IGN, None)]
    for number in ours:
        handler = before[number]
        if callable(handler) and handler is not signal.default_int_handler:
            Stop.launchers[number] = handler
        signal.signal(number, stop)
    try:
        yield
    except Exception as error:
        if Stop.end is None or error is Stop.end:
            raise
        raise Stop.end from error
    finally:
        for number in ours:
            signal.signal(number, before[number])
            Stop.launchers.pop(number, None)
        if ours:
            Stop.end = Stop.waiting = None


def stop(number: int, frame: FrameType | None) -> None:
    """Raise what the process ends with, now or as soon as it may stop.

    Asked again it raises again, since Python drops what is raised in a destructor, and the process would go
    on; but not at once: a scheduler or an impatient hand would break off what ends in good order.
    """
    if not Stop.may_stop:
        Stop.waiting = number
        return
    now = time.monotonic()
    if Stop.end is not None:
        if now < Stop.raised + SAME_REQUEST:
            return
        Stop.raised = now
        raise Stop.end
    Stop.raised = now
    try:
        if number not in Stop.launchers:
            raise SystemExit(128 + number)
        Stop.launchers[number](number, frame)
    except BaseException as end:
        Stop.end = end
        raise


@contextmanager
def stops_deferred() -> Iterator[None]:
    """Finish what must not be left half done, such as a checkpoint, before a signal ends the run."""
    Stop.may_stop = False
    try:
        yield
    finally:
        Stop.may_stop = True
        waiting, Stop.waiting = Stop.waiting, None
        if Stop.end is not None:
            raise Stop.end
        if waiting is not None:
            stop(waiting, None)


def stop_if_asked() -> None:
    """Within `unstopped`, end here if a signal has come: nothing is half done."""
    waiting, Stop.waiting = Stop.waiting, None
    if waiting is not None:
        may_stop, Stop.may_stop = Stop.may_stop, True
        try:
            stop(waiting, None)
        finally:
            Stop.may_stop = may_stop


def raise_if_stopping() -> None:
    """End here if a signal has come and what it raised was dropped: Python does so in destructors."""
    if Stop.end is not None:
        raise Stop.end


def is_stopping() -> bool:
    """Whether the process is on its way out."""
    return Stop.end is not None


def leave_signals_to_the_parent(worker: int) -> None:
    """For a worker process of a DataLoader: a signal to all processes is the parent's to answer.

    A worker ends when its parent tells it to, or is gone.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
