"""Stores that open, and those that cannot."""

import json
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from mlflow_stores import free_port, mlflow_server, start, stored
from program import Program

from okddip.errors import ConfigError
from okddip.tracking import store
from okddip.tracking.address import absolute_uri
from okddip.tracking.tracker import MLflow


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


def test_a_deleted_experiment_is_refused(tracker: MLflow) -> None:
    tracker.store.client.delete_experiment(tracker.store.experiment_id)
    command = f"MLFLOW_TRACKING_URI='{absolute_uri(tracker.uri)}' mlflow experiments restore"
    with pytest.raises(ConfigError, match=rf"tracking\.experiment={tracker.experiment}.*{command}"):
        MLflow(tracker.uri, tracker.experiment).open()


def test_requests_leave_the_environment_as_it_was(tracker: MLflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    before = dict(os.environ)
    with pytest.raises(ConfigError):
        MLflow(f"http://127.0.0.1:{free_port()}", "nobody").open()
    assert dict(os.environ) == before


@pytest.mark.parametrize("folder", ["/tmp/it's", '/tmp/12" disk', """/tmp/it's 12" wide"""])
def test_a_run_is_found_by_a_tag_with_quotes(tracker: MLflow, folder: str) -> None:
    start(tracker)
    tracker.set_tags({"folder": folder})
    assert [run.info.run_id for run in tracker.find({"folder": folder})] == [tracker.run_id]
    assert tracker.find({"folder": folder + "'"}) == []


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
    processes = [Program(tmp_path, str(seed), code=code) for seed in range(8)]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert (process.returncode, output) == (0, "")
    reader = MLflow(f"sqlite:///{tmp_path}/mlflow.db", "shared")
    reader.open()
    runs = reader.store.client.search_runs([reader.store.experiment_id])
    assert sorted(run.data.params["seed"] for run in runs) == [str(seed) for seed in range(8)]
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        for metric in ("metric0", "metric19"):
            points = reader.store.client.get_metric_history(run.info.run_id, metric)
            assert sorted(point.step for point in points) == list(range(50))


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


def test_artifacts_lie_beside_the_database(tracker: MLflow, uri: str) -> None:
    start(tracker)
    folder = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / tracker.run_id / "artifacts"
    assert (folder / "config.yaml").read_text() == "seed: 0\n"
