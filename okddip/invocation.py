"""The command line that this process carries out: its own, or the one that a call from Python stands for."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_stood_for: ContextVar[Sequence[str] | None] = ContextVar("stood_for", default=None)


@contextmanager
def standing_for(arguments: Sequence[str]) -> Iterator[None]:
    """Let what runs now be recorded as the command `okddip` with these arguments, not that of the process."""
    token = _stood_for.set(arguments)
    try:
        yield
    finally:
        _stood_for.reset(token)


def arguments() -> list[str]:
    """What follows `okddip` on the command line."""
    known = _stood_for.get()
    return list(sys.argv[1:] if known is None else known)


def command() -> str:
    """The command line as a shell takes it."""
    return shlex.join(["okddip", *arguments()])
