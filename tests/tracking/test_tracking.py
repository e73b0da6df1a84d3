"""Runs in real MLflow stores: a SQLite file made once for this file, and servers started for a test."""

import http.server
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from hydra.utils import instantiate

from okddip.errors import ConfigError
from okddip.signals import stop_on_signals
from okddip.tracking import outbox, store, system_metrics
from okddip.tracking.params import MAX_PARAM_LENGTH, MAX_TAG_LENGTH, flatten, params_of
from okddip.tracking.source import git_changes, git_commit
from okddip.tracking.tracker import DatasetSplit, MLflow, NoTracking

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
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


def test_a_run_holds_its_name_params_tags_configuration_and_command(tracker: MLflow) -> None:
    run_id = start(tracker)
    run = stored(tracker)
    assert run.info.run_id == run_id
    assert run.info.run_name == "okddip resnet8 seed0"
    assert run.info.status == "RUNNING"
    assert run.data.params == {"method.peers": "4", "seed": "0"}
    assert run.data.tags["device"] == "cpu"
    assert run.data.tags["command"] == "okddip seed=0"
    assert run.data.tags["host"] == socket.gethostname()
    assert run.data.tags["mlflow.user"]
    assert text_of(tracker, "config.yaml") == "seed: 0\n"
    assert text_of(tracker, "command.txt") == "okddip seed=0\n"


def test_artifacts_lie_beside_the_database(tracker: MLflow, uri: str) -> None:
    start(tracker)
    folder = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / tracker.run_id / "artifacts"
    assert (folder / "config.yaml").read_text() == "seed: 0\n"


def test_params_beyond_one_request_and_long_values_are_kept(tracker: MLflow) -> None:
    many = {f"option{i}": i for i in range(250)}
    start(tracker, params={"model": many, "long": "x" * 7000, "été +1": True})
    params = stored(tracker).data.params
    assert params["model.option249"] == "249"
    assert len(params["long"]) == MAX_PARAM_LENGTH
    assert params["long"].endswith("...")
    assert params["été _1"] == "true"
    assert len(params) == 252


def test_params_are_written_as_overrides() -> None:
    config = {
        "method": {"peers": 4, "teacher": None, "temperature": 3.0},
        "scheduler": {"milestones": [150, 0.5], "options": {}},
        "trainer": {"compile": False, "devices": [None, {"kind": True}]},
    }
    assert flatten(config) == {
        "method.peers": "4",
        "method.teacher": "null",
        "method.temperature": "3",
        "scheduler.milestones": "[150,0.5]",
        "scheduler.options": "{}",
        "trainer.compile": "false",
        "trainer.devices": "[null,{kind:true}]",
    }
    assert flatten(flatten(config)) == flatten(config)


def test_metrics_have_the_epoch_as_step(tracker: MLflow) -> None:
    start(tracker)
    for epoch in range(3):
        tracker.log({"train/loss": 1 / (1 + epoch), "test/peer0/top1": 90.0 + epoch}, epoch)
    assert [point[:2] for point in history(tracker, "train/loss")] == [(0, 1.0), (1, 1 / 2), (2, 1 / 3)]
    assert stored(tracker).data.metrics["test/peer0/top1"] == 92.0


def test_more_metrics_than_one_request_takes_are_kept(tracker: MLflow) -> None:
    start(tracker)
    tracker.log({f"metric{i}": i for i in range(1500)}, epoch=0)
    assert len(stored(tracker).data.metrics) == 1500


def test_a_metric_sent_again_with_its_timestamp_is_not_doubled(tracker: MLflow) -> None:
    start(tracker)
    for _ in range(2):
        tracker.log({"train/loss": 0.5}, epoch=7, timestamp_ms=1_700_000_000_000)
    assert history(tracker, "train/loss") == [(7, 0.5, 1_700_000_000_000)]


@pytest.mark.parametrize("folder", ["/tmp/it's", '/tmp/12" disk', """/tmp/it's 12" wide"""])
def test_a_run_is_found_by_a_tag_with_quotes(tracker: MLflow, folder: str) -> None:
    start(tracker)
    tracker.set_tags({"folder": folder})
    assert [run.info.run_id for run in tracker.find({"folder": folder})] == [tracker.run_id]
    assert tracker.find({"folder": folder + "'"}) == []


def test_files_become_artifacts(tracker: MLflow, tmp_path: Path) -> None:
    start(tracker)
    (tmp_path / "last.pt").write_text("weights")
    tracker.log_artifact(tmp_path / "last.pt", "checkpoints")
    tracker.log_artifact(tmp_path / "last.pt")
    assert text_of(tracker, "checkpoints/last.pt") == "weights"
    assert text_of(tracker, "last.pt") == "weights"


def test_a_file_that_is_gone_is_warned_about_and_stops_nothing(
    tracker: MLflow, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(tracker)
    tracker.log_artifact(tmp_path / "gone.pt")
    assert "gone.pt" in caplog.text
    tracker.log({"train/loss": 1.0}, epoch=0)
    assert stored(tracker).data.metrics == {"train/loss": 1.0}


def test_data_sets_are_in_their_own_field_once(tracker: MLflow) -> None:
    run_id = start(tracker)
    splits = {
        "train": DatasetSplit("digits", "0" * 16, "/data", 1438),
        "test": DatasetSplit("digits", "1" * 16, "/data", 359),
    }
    tracker.log_datasets(splits)
    start(tracker, run_id=run_id)
    tracker.log_datasets(splits)
    used = {tag.value: used.dataset for used in stored(tracker).inputs.dataset_inputs for tag in used.tags}
    assert len(stored(tracker).inputs.dataset_inputs) == 2
    assert {context: (dataset.name, dataset.digest) for context, dataset in used.items()} == {
        "train": ("digits", "0" * 16),
        "test": ("digits", "1" * 16),
    }


def test_metrics_arrive_with_results_first(tracker: MLflow) -> None:
    start(tracker)
    tracker.log({"train/lr": 1, "train/top1": 2, "test/peer0/top1": 3, "test/loss": 4, "test/top1": 5}, 0)
    names = list(stored(tracker).data.metrics)
    assert names == ["test/top1", "test/loss", "test/peer0/top1", "train/top1", "train/lr"]


def test_tags_can_be_replaced(tracker: MLflow) -> None:
    start(tracker)
    tracker.set_tags({"device": "cuda", "note": "y" * 9000})
    tags = stored(tracker).data.tags
    assert tags["device"] == "cuda"
    assert len(tags["note"]) == MAX_TAG_LENGTH


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_with_its_status(tracker: MLflow, status: str) -> None:
    start(tracker)
    tracker.finish(status)
    info = stored(tracker).info
    assert info.status == status
    assert info.end_time >= info.start_time


def test_a_run_goes_on_and_a_changed_param_becomes_a_tag(tracker: MLflow) -> None:
    first = start(tracker, params={"trainer": {"epochs": 10}, "seed": 0})
    tracker.finish("KILLED")
    params = {"trainer": {"epochs": 20, "resume": "auto"}, "seed": 0}
    again = MLflow(tracker.uri, tracker.experiment)
    again.open()
    assert start(again, params=params, command="okddip trainer.epochs=20", run_id=first) == first
    run = stored(again)
    assert run.info.status == "RUNNING"
    assert run.data.params == {"trainer.epochs": "10", "trainer.resume": "auto", "seed": "0"}
    resumed = {key: value for key, value in run.data.tags.items() if key.startswith("resumed.")}
    assert resumed == {"resumed.trainer.epochs": "20"}
    assert run.data.tags["command"] == "okddip trainer.epochs=20"
    assert params_of(run) == {"trainer.epochs": "20", "trainer.resume": "auto", "seed": "0"}

    again.finish("KILLED")  # and back
    start(again, params={"trainer": {"epochs": 10, "resume": "auto"}, "seed": 0}, run_id=first)
    assert params_of(stored(again))["trainer.epochs"] == "10"


def test_a_run_that_does_not_exist_cannot_go_on(tracker: MLflow) -> None:
    with pytest.raises(ConfigError, match=r"0123abc.*tracking\.uri"):
        start(tracker, run_id="0123abc")


def test_two_runs_of_one_process_do_not_meet(uri: str) -> None:
    one, two = MLflow(uri, "one"), MLflow(uri, "two")
    for tracker in (one, two):
        tracker.open()
        start(tracker)
    one.log({"train/loss": 1.0}, epoch=0)
    two.log({"train/loss": 2.0}, epoch=0)
    one.finish("FAILED")
    assert stored(one).data.metrics == {"train/loss": 1.0}
    assert stored(two).data.metrics == {"train/loss": 2.0}
    assert stored(two).info.status == "RUNNING"


def test_a_relative_path_stays_where_the_run_began(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(uri.removeprefix("sqlite:///")).parent)
    tracker = MLflow("sqlite:///mlflow.db", "relative")
    tracker.open()
    monkeypatch.chdir(tmp_path)
    start(tracker)
    tracker.finish("FINISHED")
    assert stored(tracker).info.status == "FINISHED"
    assert list(tmp_path.iterdir()) == []


def test_a_deleted_experiment_is_refused(tracker: MLflow) -> None:
    tracker.store.client.delete_experiment(tracker.store.experiment_id)
    with pytest.raises(ConfigError, match=rf"tracking\.experiment={tracker.experiment}.*restore"):
        MLflow(tracker.uri, tracker.experiment).open()


def test_requests_leave_the_environment_as_it_was(tracker: MLflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    before = dict(os.environ)
    with pytest.raises(ConfigError):
        MLflow(f"http://127.0.0.1:{free_port()}", "nobody").open()
    assert dict(os.environ) == before


class TestAStoreThatCannotBeOpened:
    """Each is refused by the key, the value and what is allowed."""

    @pytest.fixture(autouse=True)
    def less_patience(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(store, "OPEN_SECONDS", 1.0)

    def refused(self, uri: str, reason: str = "") -> None:
        with pytest.raises(ConfigError) as refusal:
            MLflow(uri, "never").open()
        message = str(refusal.value)
        assert message.startswith(f"tracking.uri={uri}: ")
        assert "sqlite:///FILE" in message
        assert reason in message

    def test_a_port_that_refuses(self) -> None:
        self.refused(f"http://127.0.0.1:{free_port()}", "refused")

    def test_a_server_that_never_answers(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            self.refused(f"http://127.0.0.1:{silent.getsockname()[1]}")

    def test_a_host_that_does_not_exist(self) -> None:
        self.refused("http://no-such-host.invalid:5000")

    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        self.refused(f"sqlite:///{tmp_path}/no/such/folder/mlflow.db", "unable to open")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder that root cannot write")
    def test_a_folder_that_cannot_be_written(self) -> None:
        self.refused("sqlite:////proc/mlflow.db", "unable to open")

    def test_a_folder_without_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may do all
        self.refused(f"sqlite:///{tmp_path}/mlflow.db", f"{tmp_path} cannot be written")

    def test_a_file_that_is_no_database(self, tmp_path: Path) -> None:
        (tmp_path / "mlflow.db").write_text("These are notes of mine.\n" * 100)
        self.refused(f"sqlite:///{tmp_path}/mlflow.db", "not a database")

    @pytest.mark.parametrize(
        "uri", ["foo://somewhere", "http://", "sqlite:mlflow.db", "postgresql://127.0.0.1:1/x"]
    )
    def test_an_address_that_means_nothing(self, uri: str) -> None:
        self.refused(uri)

    @pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:"])
    def test_a_store_in_memory(self, uri: str) -> None:
        self.refused(uri, "gone with the run")

    def test_nothing(self) -> None:
        self.refused("", "empty")


def test_a_signal_breaks_off_an_upload_which_is_left_to_the_run_that_goes_on(
    tracker: MLflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start(tracker)
    never = threading.Event()
    monkeypatch.setattr(tracker.store.client, "log_artifact", lambda *_: never.wait(600))
    monkeypatch.setattr(outbox, "UPLOAD_SECONDS", 600.0)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit), stop_on_signals():
        tracker.log_artifact(tmp_path / "last.pt")
    tracker.finish("KILLED")
    never.set()
    assert stored(tracker).info.status == "KILLED"
    assert caplog.text == ""


class TestAStoreThatGoesAway:
    """A tracker whose requests fail for a while; with real servers it is tested below."""

    @pytest.fixture(autouse=True)
    def no_wait_between_attempts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.0)

    @contextmanager
    def away(self, tracker: MLflow) -> Iterator[None]:
        def fail(*_: object) -> None:
            raise requests.ConnectionError("nobody there")

        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(tracker.store, "call", fail)
            yield

    def test_what_it_lacks_is_sent_when_it_answers_again(
        self, tracker: MLflow, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        start(tracker)
        (tmp_path / "best.pt").write_text("weights")
        with self.away(tracker):
            tracker.log({"train/loss": 1.0}, epoch=0, timestamp_ms=1000)
            tracker.set_tags({"state": "away"})
            tracker.log_artifact(tmp_path / "best.pt")
            tracker.log({"train/loss": 0.5}, epoch=1, timestamp_ms=2000)
        tracker.log({"train/loss": 0.2}, epoch=2, timestamp_ms=3000)
        assert history(tracker, "train/loss") == [(0, 1.0, 1000), (1, 0.5, 2000), (2, 0.2, 3000)]
        assert stored(tracker).data.tags["state"] == "away"
        assert text_of(tracker, "best.pt") == "weights"
        assert caplog.text.count("does not take") == 1

    def test_it_is_left_alone_for_a_while_and_asked_again_at_the_end(
        self, tracker: MLflow, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(outbox, "RETRY_SECONDS", 3600.0)
        start(tracker)
        with self.away(tracker):
            tracker.log({"train/loss": 1.0}, epoch=0, timestamp_ms=1000)
        tracker.log({"train/loss": 0.5}, epoch=1, timestamp_ms=2000)
        assert history(tracker, "train/loss") == []
        tracker.finish("FINISHED")
        assert history(tracker, "train/loss") == [(0, 1.0, 1000), (1, 0.5, 2000)]
        assert stored(tracker).info.status == "FINISHED"

    def test_what_it_lacks_in_the_end_is_named(
        self, tracker: MLflow, caplog: pytest.LogCaptureFixture
    ) -> None:
        start(tracker)
        with self.away(tracker):
            tracker.log({"train/loss": 1.0}, epoch=41)
            tracker.finish("FINISHED")
        assert f"{tracker.run_id} lacks epoch 41, status" in caplog.text

    def test_a_request_that_it_refuses_stops_no_other(
        self, tracker: MLflow, caplog: pytest.LogCaptureFixture
    ) -> None:
        start(tracker)
        tracker.log({"no % sign in a name": 1.0}, epoch=0)
        tracker.log({"train/loss": 1.0}, epoch=0)
        assert "refuses epoch 0" in caplog.text
        assert stored(tracker).data.metrics == {"train/loss": 1.0}


def test_no_tracking_has_the_interface_of_mlflow(tmp_path: Path) -> None:
    def interface(kind: type) -> set[str]:
        return {name for name, _ in inspect.getmembers(kind, callable) if not name.startswith("_")}

    assert interface(NoTracking) == interface(MLflow)
    tracker = NoTracking()
    tracker.open()
    assert start(tracker) == ""
    tracker.finish("FINISHED")


@pytest.mark.parametrize(("option", "kind"), [("mlflow", MLflow), ("none", NoTracking)])
def test_option_files_build_a_tracker(option: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = instantiate(yaml.safe_load((REPOSITORY / f"conf/tracking/{option}.yaml").read_text()))
    assert type(tracker) is kind


def test_nothing_heavy_is_imported_before_a_store_is_opened() -> None:
    code = (
        "import sys, okddip.tracking.tracker as t; t.MLflow('sqlite:///x.db', 'e'); "
        "print({'mlflow', 'sqlalchemy', 'torch', 'requests'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert answer.stdout.strip() == "set()", answer.stderr


def test_the_commit_is_that_of_the_folder(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert git_commit(tmp_path) == head.strip()


def test_files_that_are_not_as_committed_are_found(tmp_path: Path) -> None:
    assert git_changes(tmp_path) == []
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b.c"]
    for name in ("kept.py", "changed.py"):
        (tmp_path / name).write_text("1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    assert git_changes(tmp_path) == []
    (tmp_path / "changed.py").write_text("2\n")
    (tmp_path / "results.txt").write_text("no code\n")
    assert git_changes(tmp_path) == ["changed.py"]


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


@pytest.mark.slow
def test_files_that_hang_hold_up_neither_epochs_nor_the_end_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox, "UPLOAD_SECONDS", 5)
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.1)
    (tmp_path / "last.pt").write_bytes(b"weights")
    port = free_port()
    served = ("--artifacts-destination", str(tmp_path / "artifacts"), "--serve-artifacts")
    with mlflow_server(tmp_path, port, *served), without_artifacts(port) as behind:
        tracker = MLflow(f"http://127.0.0.1:{behind}", "hanging")
        tracker.open()
        start(tracker)
        waited = []
        for epoch in range(3):
            time.sleep(0.2)
            before = time.monotonic()
            tracker.log({"train/loss": 1.0}, epoch)
            waited.append(time.monotonic() - before)
        tracker.log_artifact(tmp_path / "last.pt")
        tracker.finish("FINISHED")
        run = tracker.store.client.get_run(tracker.run_id)
        assert run.info.status == "FINISHED"
        assert len(tracker.store.client.get_metric_history(tracker.run_id, "train/loss")) == 3
    assert max(waited) < 5  # two answers of a second at most, on a machine that does other things too
    assert caplog.text.count("does not take config.yaml") == 1
    assert "lacks config.yaml, command.txt, last.pt" in caplog.text


@pytest.mark.slow
def test_a_server_started_beside_the_database_shows_runs_and_artifacts(uri: str, tracker: MLflow) -> None:
    start(tracker)
    tracker.log({"train/loss": 0.25}, epoch=3)
    tracker.finish("FINISHED")
    port = free_port()

    def get(path: str, /, **query: str) -> bytes:
        url = f"http://127.0.0.1:{port}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.read()

    with mlflow_server(Path(uri.removeprefix("sqlite:///")).parent, port):
        run = json.loads(get("/api/2.0/mlflow/runs/get", run_id=tracker.run_id))["run"]
        files = json.loads(get("/api/2.0/mlflow/artifacts/list", run_id=tracker.run_id))["files"]
        config = get("/get-artifact", run_uuid=tracker.run_id, path="config.yaml")
    assert run["info"]["status"] == "FINISHED"
    assert [(metric["key"], metric["step"]) for metric in run["data"]["metrics"]] == [("train/loss", 3)]
    assert {file["path"] for file in files} == {"config.yaml", "command.txt"}
    assert config == b"seed: 0\n"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stopped", "frozen"])
def test_a_server_that_is_away_for_a_while_lacks_nothing(
    uri: str, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, port = Path(uri.removeprefix("sqlite:///")).parent, free_port()
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.0)
    tracker = MLflow(f"http://127.0.0.1:{port}", f"server {fault}")
    (tmp_path / "best.pt").write_bytes(b"weights")

    def train_alone() -> None:
        for epoch in (1, 2):
            tracker.log({"train/loss": 1.0 / epoch}, epoch, timestamp_ms=1000 * epoch)
        tracker.log_artifact(tmp_path / "best.pt")

    with mlflow_server(folder, port) as server:
        tracker.open()
        start(tracker)
        tracker.log({"train/loss": 9.0}, epoch=0, timestamp_ms=0)
        if fault == "frozen":
            os.killpg(server.pid, signal.SIGSTOP)
            train_alone()
            os.killpg(server.pid, signal.SIGCONT)
            time.sleep(1)
            tracker.finish("FINISHED")
    if fault == "stopped":
        train_alone()
        with mlflow_server(folder, port):
            tracker.log({"train/loss": 0.1}, epoch=3, timestamp_ms=3000)
            tracker.finish("FINISHED")

    direct = MLflow(uri, "reader")
    direct.open()
    direct.run_id = tracker.run_id
    assert [point for point in history(direct, "train/loss") if point[0] < 3] == [
        (0, 9.0, 0),
        (1, 1.0, 1000),
        (2, 0.5, 2000),
    ]
    assert stored(direct).info.status == "FINISHED"
    assert list((folder / "mlartifacts").glob(f"**/{tracker.run_id}/artifacts/best.pt"))
    assert caplog.text.count("does not take") == 1


@pytest.mark.slow
def test_eight_processes_share_a_store_that_does_not_exist_yet(tmp_path: Path) -> None:
    code = """
import sys
from okddip.tracking.tracker import MLflow
tracker = MLflow("sqlite:///mlflow.db", "shared")
tracker.open()
tracker.start(f"run {sys.argv[1]}", {"seed": sys.argv[1]}, {}, "", "okddip")
for epoch in range(50):
    tracker.log({f"metric{i}": float(epoch) for i in range(20)}, epoch)
tracker.finish("FINISHED")
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(seed)],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(8)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert errors == ""
    reader = MLflow(f"sqlite:///{tmp_path}/mlflow.db", "shared")
    reader.open()
    runs = reader.store.client.search_runs([reader.store.experiment_id])
    assert sorted(run.data.params["seed"] for run in runs) == [str(seed) for seed in range(8)]
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        for metric in ("metric0", "metric19"):
            points = reader.store.client.get_metric_history(run.info.run_id, metric)
            assert sorted(point.step for point in points) == list(range(50))


def test_system_metrics_are_off_unless_asked_for(tracker: MLflow) -> None:
    start(tracker)
    tracker.watch_system()
    assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("switch", ["checkpoints", "system_metrics"])
def test_a_switch_that_is_neither_on_nor_off_is_refused(tmp_path: Path, switch: str) -> None:
    switches: Any = {switch: "maybe"}
    with pytest.raises(ConfigError, match=rf"tracking\.{switch}=maybe"):
        MLflow(f"sqlite:///{tmp_path}/mlflow.db", "first", **switches).open()
    assert list(tmp_path.iterdir()) == []


def test_system_metrics_without_what_measures_them_are_refused(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ConfigError, match=r"tracking\.system_metrics=true: needs psutil.*okddip\[system\]"):
        MLflow(uri, "first", system_metrics=True).open()


def test_system_metrics_go_on_with_the_run_that_goes_on(
    tracker: MLflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    name = "system/cpu_utilization_percentage"

    def part(run_id: str | None, points: int) -> str:
        watched = MLflow(tracker.uri, tracker.experiment, system_metrics=True)
        watched.open()
        run_id = start(watched, run_id=run_id)
        watched.watch_system()
        for _ in range(200):
            if len(history(watched, name)) >= points:
                break
            time.sleep(0.1)
        watched.finish("FINISHED")
        assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}
        steps = [step for step, *_ in history(watched, name)]
        assert len(steps) >= points
        assert steps == list(range(len(steps)))
        return run_id

    run_id = part(None, 2)
    part(run_id, 5)


@pytest.mark.slow
def test_system_metrics_hold_nothing_up_and_come_back_with_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    monkeypatch.setattr(system_metrics, "RETRY_SECONDS", 0.1)
    name = "system/cpu_utilization_percentage"
    port = free_port()

    def wait_for_points(more_than: int) -> int:
        for _ in range(600):
            points = len(history(tracker, name))
            if points > more_than:
                return points
            time.sleep(0.1)
        raise AssertionError(f"no more than {points} points of {name}")

    with mlflow_server(tmp_path, port):
        tracker = MLflow(f"http://127.0.0.1:{port}", "watched", system_metrics=True)
        tracker.open()
        start(tracker)
        tracker.watch_system()
        before = wait_for_points(0)
    time.sleep(2)  # MLflow's own monitor gives up here
    with mlflow_server(tmp_path, port) as server:
        wait_for_points(before)
        os.killpg(server.pid, signal.SIGSTOP)
        answers = threading.Timer(30, os.killpg, (server.pid, signal.SIGCONT))
        answers.start()
        tracker.finish("KILLED")
        assert answers.is_alive()  # the run ended although the server hangs
        answers.cancel()
