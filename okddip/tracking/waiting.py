"""Calls of a store that may not answer: how long each is waited for."""

import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from okddip.signals import raise_deferred_stop

if TYPE_CHECKING:  # importing MLflow takes more than a second, and `okddip --help` has no use for it
    import mlflow


def call_within(seconds: float, call: Callable[[], Any]) -> Any:
    """Call in a thread that is left behind when the time is up: a name look-up knows no timeout.

    Raises:
        TimeoutError: the time is up.
        Exception: what the call raises.
    """
    with http_settings(seconds):
        answer = call_in_thread(call)
        if not wait([answer], timeout=seconds).done:
            raise TimeoutError(f"no answer within {seconds:g} s")
    return answer.result()


def call_in_thread(call: Callable[[], Any]) -> Future[Any]:
    """Call in a thread that the end of the process does not wait for."""
    answer: Future[Any] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer


@contextmanager
def http_settings(seconds: float) -> Iterator[None]:
    """MLflow's requests within: one attempt (it makes eight, for minutes), and nothing printed."""
    settings = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(math.ceil(seconds)),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    before = {name: os.environ[name] for name in settings if name in os.environ}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


class InterruptibleClient:
    """MLflow's client of a store, within `stops_deferred`: a signal ends the wait for a call, not the call.

    A transaction that is broken off keeps SQLite's lock, so that the run's end cannot be written down.
    """

    def __init__(self, client: "mlflow.MlflowClient") -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._call, getattr(self._client, name))

    def _call(self, method: Callable[..., Any], *given: Any, **named: Any) -> Any:
        answer = call_in_thread(partial(method, *given, **named))
        while not wait([answer], timeout=0.1).done:
            raise_deferred_stop()
        raise_deferred_stop()
        return answer.result()


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
