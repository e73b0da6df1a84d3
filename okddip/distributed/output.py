"""What ranks print and log: one message once, whichever rank has it."""

import io
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from okddip.distributed.environment import local_rank, rank, world_size
from okddip.distributed.exchange import gather
from okddip.signals import is_stopping

log = logging.getLogger(__name__)

# Seconds that a rank waits before it exits after another has failed. If it left first, torchrun would end the
# other before its message is out.
SECONDS_BEFORE_EXIT = 20.0


@contextmanager
def rank_0_speaks() -> Iterator[None]:
    """Until `process_group`, let rank 0 alone print what all would: help, or an error in the command.

    An error of another rank alone is printed by that one, after a wait: were it an error of all ranks,
    torchrun would have ended it together with rank 0 by then.
    """
    if rank() == 0:
        yield
        return
    unprinted = io.StringIO()
    sys.stdout = sys.stderr = unprinted
    try:
        yield
    except SystemExit as end:
        if end.code and sys.stderr is unprinted and not is_stopping():
            # on each machine, one rank waits less than the others
            time.sleep(SECONDS_BEFORE_EXIT if local_rank() == 0 else 1.2 * SECONDS_BEFORE_EXIT)
            sys.__stderr__.write(unprinted.getvalue())  # type: ignore[union-attr]
        raise
    finally:
        restore_output()


def restore_output() -> None:
    """Let this rank print again."""
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


class WarningCollector(logging.Handler):
    """Keeps the warnings of this rank for `log_warnings_of_all_ranks`."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


_collector = WarningCollector()


@contextmanager
def collected_warnings() -> Iterator[None]:
    """Collect what the program warns of; ranks other than 0 log nothing else."""
    program = logging.getLogger("okddip")
    program.addHandler(_collector)
    if rank() > 0:
        program.setLevel(logging.WARNING)
    try:
        yield
    finally:
        program.removeHandler(_collector)


def log_warnings_of_all_ranks() -> None:
    """Let rank 0 log the warnings of other ranks since the last time, except those it has logged itself."""
    if world_size() == 1:
        return
    gathered = gather(_collector.messages)
    if rank() == 0:
        for other, messages in enumerate(gathered):
            for message in messages:
                if message not in gathered[0]:
                    log.warning("Rank %d: %s", other, message)
    _collector.messages.clear()


def hide_progress_bar() -> bool:
    """tqdm's `disable`: a bar on rank 0 alone, and there in a terminal or a notebook alone."""
    return rank() > 0 or not (sys.stderr.isatty() or in_notebook())


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook, whose output shows bars and is no terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config
