"""End a run in good order when it is asked to stop: Ctrl-C, Slurm's preemption, a time limit."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType

# Slurm sends SIGTERM at the end, and SIGUSR1 or SIGUSR2 ahead of it where it is asked to; a terminal that
# is closed sends SIGHUP
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

SAME_REQUEST_SECONDS = 2.0  # a signal this soon after another one is the same request


@dataclass
class StopState:
    """How far this process is on its way out."""

    exception: BaseException | None = None  # ends the process; None until it was asked to stop
    raised_at: float = 0.0  # when the exception was last raised
    deferring: bool = False  # within `stops_deferred`
    deferred: Callable[[], None] | None = None  # handles the signal that came within `stops_deferred`


_state = StopState()


@dataclass(frozen=True)
class StopHandler:
    """Handler of a signal that stops the process.

    Attributes:
        launcher: the handler that a launcher had installed before; it decides how the process ends.
    """

    launcher: Callable[[int, FrameType | None], object] | None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raise what ends the process, unless that is deferred or was raised just now.

        A later signal raises it again, as Python drops an exception that is raised in a destructor. One that
        follows at once does not: it would interrupt what ends the run in good order.
        """
        if _state.deferring:
            _state.deferred = partial(self, number, None)
            return
        now = time.monotonic()
        if _state.exception is not None:
            if now >= _state.raised_at + SAME_REQUEST_SECONDS:
                _state.raised_at = now
                raise _state.exception
            return
        _state.raised_at = now
        try:
            if self.launcher is None:
                raise SystemExit(128 + number)
            self.launcher(number, frame)
        except BaseException as exception:
            _state.exception = exception
            raise


@contextmanager
def stop_on_signals(*, keyboard_interrupt: bool = False) -> Iterator[None]:
    """Let signals raise SystemExit, with the exit code that shells give to signals.

    With `keyboard_interrupt` Ctrl-C raises KeyboardInterrupt as elsewhere in Python: it ends the run, and a
    notebook or a script around it goes on.

    No `except Exception` on the way holds that up. Where a launcher has a handler of its own (submitit's
    requeues the job), that one decides how the process ends. An exception that follows a request to stop is
    taken for its consequence: processes on which this one depends may have received the signal too.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()  # only there handlers can be set
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS} if in_main_thread else {}
    replaced = {
        number: handler
        for number, handler in handlers.items()
        if not isinstance(handler, StopHandler) and handler not in (signal.SIG_IGN, None)
    }
    for number, handler in replaced.items():
        by_launcher = callable(handler) and (keyboard_interrupt or handler is not signal.default_int_handler)
        signal.signal(number, StopHandler(handler if by_launcher else None))  # type: ignore[arg-type]
    try:
        yield
    except Exception as error:
        if _state.exception is None or error is _state.exception:
            raise
        raise _state.exception from error
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
        if replaced:
            _state.exception = _state.deferred = None


@contextmanager
def stops_deferred() -> Iterator[None]:
    """Finish what must not be left half done, such as a checkpoint, before a signal ends the run."""
    _state.deferring = True
    try:
        yield
    finally:
        _state.deferring = False
        deferred, _state.deferred = _state.deferred, None
        raise_if_stopping()
        if deferred is not None:
            deferred()


def raise_deferred_stop() -> None:
    """Within `stops_deferred`, end here if a signal has come: nothing is half done."""
    deferred, _state.deferred = _state.deferred, None
    if deferred is not None:
        deferring, _state.deferring = _state.deferring, False
        try:
            deferred()
        finally:
            _state.deferring = deferring


def raise_if_stopping() -> None:
    """End here if a signal has come whose exception Python dropped, as it does in destructors."""
    if _state.exception is not None:
        raise _state.exception


def is_stopping() -> bool:
    """Whether the process was asked to stop."""
    return _state.exception is not None


def ignore_signals_in_worker(worker: int) -> None:
    """For a worker process of a DataLoader: its parent handles signals that are sent to all processes.

    A worker ends when its parent tells it to, or is gone.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
