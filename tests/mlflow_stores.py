"""Stores for tests: a SQLite file made once, and servers started for a test."""

import http.server
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from okddip.tracking import sqlite
from okddip.tracking.tracker import MLflow, NoTracking

if TYPE_CHECKING:  # tests on a GPU may have no MLflow
    from mlflow import MlflowClient
    from sqlalchemy import URL, Engine


@pytest.fixture(autouse=True)
def copied_tables(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """New SQLite stores of this process are copies of one: MLflow makes its tables in seconds, each time."""
    tables, made = tmp_path_factory.getbasetemp() / "tables.db", sqlite.create_store

    def copy_tables(engine: "Engine") -> None:
        with closing(sqlite3.connect(tables)) as source, closing(sqlite3.connect(engine.url.database)) as new:
            source.backup(new)

    def create_store(url: "URL") -> None:
        from mlflow.store.db import utils

        if not tables.exists():
            made(url.set(database=str(tables)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utils, "_initialize_tables", copy_tables)
            made(url)

    monkeypatch.setattr(sqlite, "create_store", create_store)


@pytest.fixture(scope="session")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store whose tables exist; creating them takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('a störe') / 'mlflow.db'}"
    MLflow(uri, "first").open()
    return uri


@pytest.fixture
def tracker(uri: str, request: pytest.FixtureRequest) -> MLflow:
    """An open tracker with an experiment of the test's own."""
    tracker = MLflow(uri, request.node.name)
    tracker.open()
    return tracker


def start(tracker: MLflow | NoTracking, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "name": "okddip resnet8 seed0",
        "params": {"method": {"peers": 4}, "seed": 0},
        "tags": {"device": "cpu"},
        "config_yaml": "seed: 0\n",
        "command": "okddip seed=0",
    }
    return tracker.start(**{**arguments, **changes})


def stored(tracker: MLflow) -> Any:
    return tracker.store.client.get_run(tracker.run_id)


def history(tracker: MLflow, metric: str) -> list[tuple[int, float, int]]:
    found = tracker.store.client.get_metric_history(tracker.run_id, metric)
    return sorted((point.step, point.value, point.timestamp) for point in found)


def text_of(tracker: MLflow, artifact: str) -> str:
    return Path(tracker.store.client.download_artifacts(tracker.run_id, artifact)).read_text()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextmanager
def mlflow_server(folder: Path, port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`mlflow server`; with no options but its port, as a user starts it beside mlflow.db."""
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # seven processes that have no part in runs
    with (folder / "server.log").open("a") as output:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        end = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                log = (folder / "server.log").read_text()
                assert server.poll() is None, log
                assert time.monotonic() < end, log
                time.sleep(0.1)
        yield server
    finally:
        os.killpg(server.pid, signal.SIGCONT)
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextmanager
def without_artifacts(server: int) -> Iterator[int]:
    """The port of a proxy of a server, whose store of artifacts takes no file and says nothing."""
    stop = threading.Event()

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.command == "PUT" and "mlflow-artifacts" in self.path:
                stop.wait(600)
                return
            url = f"http://127.0.0.1:{server}{self.path}"
            headers = {"Content-Type": self.headers.get("Content-Type") or "application/json"}
            request = urllib.request.Request(url, body or None, headers, method=self.command)
            try:
                with urllib.request.urlopen(request) as answer:
                    status, said = answer.status, answer.read()
            except urllib.error.HTTPError as error:
                status, said = error.code, error.read()
            self.send_response(status)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_GET = do_POST = do_PUT = do_PATCH = do_any

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield proxy.server_address[1]
        finally:
            stop.set()
            proxy.shutdown()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose tables exist; creating them takes seconds."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MLflow(f"sqlite:///{file}", "first").open()
    return file


@pytest.fixture
def client(empty_store: Path, tmp_path: Path) -> "MlflowClient":
    """Of the store that runs of this test write to."""
    from mlflow import MlflowClient

    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
