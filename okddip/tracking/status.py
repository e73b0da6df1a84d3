"""How a run ends in MLflow, and where to look at it then."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from okddip import distributed
from okddip.signals import is_stopping, stops_deferred
from okddip.tracking import tracker as tracking

log = logging.getLogger(__name__)


@contextmanager
def tracked_to_the_end(tracker: tracking.MLflow | tracking.NoTracking) -> Iterator[None]:
    """End the MLflow run as what it became: finished, failed, or killed by a signal at whatever moment."""
    try:
        try:
            yield
            tracker.finish("FINISHED")
        except Exception:
            if is_stopping():
                raise
            tracker.finish("FAILED")
            raise
    except BaseException as error:
        if is_stopping() or not isinstance(error, Exception):
            with stops_deferred():
                tracker.finish("FAILED" if distributed.another_failed() else "KILLED")
        raise


def log_how_to_open(tracker: tracking.MLflow | tracking.NoTracking) -> None:
    """Say how to look at the run."""
    if lines := tracker.how_to_open():
        log.info(lines)
