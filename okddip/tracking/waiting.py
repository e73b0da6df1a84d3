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


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Call in a thread that is left behind when the time is up: a name look-up knows no timeout."""
    outcome: list[Any] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    with _http_settings(seconds):
        thread.start()
        thread.join(seconds)
    if failure:
        raise failure[0]
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return outcome[0]


@contextmanager
def _http_settings(seconds: float) -> Iterator[None]:
    """MLflow's requests within: one attempt (it makes eight, for minutes), and nothing printed."""
    settings = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(math.ceil(seconds)),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class InterruptibleClient:
    """A client of a store, within `unstopped`: a signal breaks off the wait for a call, and no transaction.

    A transaction that is broken off keeps SQLite's lock, so that the run's end cannot be written down.
    """

    def __init__(self, client: "mlflow.MlflowClient") -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._call, getattr(self._client, name))

    def _call(self, method: Callable[..., Any], *given: Any, **named: Any) -> Any:
        answer: Future[Any] = Future()

        def run() -> None:
            try:
                answer.set_result(method(*given, **named))
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        while not wait([answer], timeout=0.1).done:
            raise_deferred_stop()
        raise_deferred_stop()
        return answer.result()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
