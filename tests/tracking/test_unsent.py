"""A store calls no run running that is over: the next command that opens it tells it what became of it."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from conftest import Answer
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from mlflow_stores import free_port, mlflow_server
from program import Program

from okddip.tracking import outbox
from okddip.tracking.store import open_store
from okddip.tracking.tracker import DatasetSplit, MLflow
from okddip.tracking.unsent import unsent_file

SMALL = ("dataset=digits", "model=resnet8", "method=baseline", "trainer.epochs=2", "trainer.limit_batches=1")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def away() -> pytest.MonkeyPatch:
    """Let a store's calls fail as those of a server that is away do, until it is undone."""
    patch = pytest.MonkeyPatch()

    def fail(*_: object, **__: object) -> None:
        raise MlflowException("no answer", error_code=TEMPORARILY_UNAVAILABLE)

    for name in ("log_batch", "log_inputs", "set_terminated", "log_artifact", "log_text"):
        patch.setattr(mlflow.MlflowClient, name, fail)
    return patch


def begin(uri: str, folder: Path, **tags: str) -> MLflow:
    """A run with a folder; nothing else of it is there."""
    folder.mkdir(exist_ok=True)
    tracker = MLflow(uri, "first")
    tracker.open()
    tracker.start("run", {"seed": 0}, {"folder": str(folder), **tags}, "seed: 0\n", "okddip")
    return tracker


def status(uri: str, run_id: str) -> str:
    """What the next command finds."""
    return open_store(uri).get_run(run_id).info.status


def test_what_a_run_could_not_send_at_its_end_is_sent_by_the_next_command(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    tracker = begin(uri, folder)
    tracker.log({"train/loss": 2.0}, 0, timestamp_ms=1000)
    (folder / "best.pt").write_bytes(b"weights")
    store_away = away()
    tracker.log({"train/loss": float("nan"), "test/top1": 9.5}, 1, timestamp_ms=2000)
    tracker.set_tags({"note": "a tag"})
    tracker.log_datasets({"train": DatasetSplit("digits", "0123", "/data", 1438)})
    tracker.log_artifact(folder / "best.pt")
    before = time.time_ns() // 1_000_000
    tracker.finish("FINISHED")
    after = time.time_ns() // 1_000_000
    store_away.undo()
    kept = folder / f"unsent-{tracker.run_id}.json"
    assert f"It is kept in {kept}; the next command" in caplog.text
    assert tracker.store.client.get_run(tracker.run_id).info.status == "RUNNING"

    assert status(uri, tracker.run_id) == "FINISHED"
    run = tracker.store.client.get_run(tracker.run_id)
    assert before <= run.info.end_time <= after
    assert run.data.tags["note"] == "a tag"
    assert run.data.metrics["test/top1"] == 9.5
    points = tracker.store.client.get_metric_history(tracker.run_id, "train/loss")
    assert [(point.step, point.timestamp) for point in points] == [(0, 1000), (1, 2000)]
    [used] = run.inputs.dataset_inputs
    assert (used.dataset.digest, used.tags[0].value) == ("0123", "train")
    assert "best.pt" in {file.path for file in tracker.store.client.list_artifacts(tracker.run_id)}
    assert not kept.exists()


def test_a_file_that_is_gone_since_holds_up_nothing_else(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = begin(uri, tmp_path / "run")
    (tmp_path / "run" / "best.pt").write_bytes(b"weights")
    store_away = away()
    tracker.log_artifact(tmp_path / "run" / "best.pt")
    tracker.finish("FAILED")
    store_away.undo()
    (tmp_path / "run" / "best.pt").unlink()
    assert status(uri, tracker.run_id) == "FAILED"
    assert f"MLflow run {tracker.run_id} cannot get best.pt" in caplog.text


def test_a_run_that_goes_on_is_not_ended_by_what_it_could_not_send(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tracker = begin(uri, folder)
    store_away = away()
    tracker.finish("KILLED")
    store_away.undo()
    assert unsent_file(folder, tracker.run_id).exists()
    with FileLock(folder / "run.lock"):  # as a run that is taken up does, before it opens the store
        again = MLflow(uri, "first")
        again.open()
        again.start("run", {}, {"folder": str(folder)}, "", "okddip", run_id=tracker.run_id)
        assert status(uri, tracker.run_id) == "RUNNING"
    assert status(uri, tracker.run_id) == "KILLED"  # its process is gone; and nothing old is sent
    assert not unsent_file(folder, tracker.run_id).exists()


def test_a_run_that_was_killed_outright_is_ended_and_one_that_lives_or_is_elsewhere_is_not(
    uri: str, tmp_path: Path
) -> None:
    living, killed, moved = (begin(uri, tmp_path / name) for name in ("living", "killed", "moved"))
    elsewhere = begin(uri, tmp_path / "killed", host="elsewhere")
    beside = begin(uri, tmp_path / "killed", kind="evaluation")  # which holds no lock
    (tmp_path / "killed" / "run.lock").touch()
    last = time.time() - 3600
    os.utime(tmp_path / "killed" / "run.lock", (last, last))
    with FileLock(tmp_path / "living" / "run.lock"):
        client = open_store(uri)
        statuses = [client.get_run(each.run_id).info.status for each in (living, killed, moved)]
        assert statuses == ["RUNNING", "KILLED", "RUNNING"]
        assert client.get_run(elsewhere.run_id).info.status == "RUNNING"
        assert client.get_run(beside.run_id).info.status == "RUNNING"
        assert client.get_run(killed.run_id).info.end_time == pytest.approx(last * 1000, abs=2)


def test_what_others_write_into_a_store_opens_no_file_of_the_user(uri: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    run_id = begin(uri, tmp_path / "run").run_id
    wanted = [["secret", "file", [str(secret), None]], ["status", "end", ["FINISHED", 2_000_000_000_000]]]
    unsent_file(tmp_path / "run", run_id).write_text(json.dumps(wanted))
    assert status(uri, run_id) == "FINISHED"
    assert "secret.txt" not in [file.path for file in open_store(uri).list_artifacts(run_id)]
    foreign = begin(uri, tmp_path / "sweep", kind="sweep", lock=str(secret)).run_id
    linked = begin(uri, tmp_path / "linked").run_id
    (tmp_path / "linked" / "run.lock").symlink_to(secret)
    assert status(uri, foreign) == status(uri, linked) == "RUNNING"
    assert secret.read_text() == "mine"


def test_a_damaged_note_of_what_is_unsent_keeps_no_command_from_the_store(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = begin(uri, tmp_path / "run")
    unsent_file(tmp_path / "run", tracker.run_id).write_text('[["status", "end"')
    assert status(uri, tracker.run_id) == "RUNNING"
    assert f"MLflow run {tracker.run_id} is over, and still called running" in caplog.text


@pytest.mark.slow
def test_a_report_ends_a_killed_run_of_training(okddip: Callable[..., Answer], tmp_path: Path) -> None:
    assert okddip(*SMALL).code == 0
    process = Program(tmp_path, *SMALL, "seed=1", "trainer.epochs=1000")
    while not list(tmp_path.glob("outputs/*seed1*/*/previous.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")

    def statuses() -> list[str]:
        return [run.info.status for run in client.search_runs(["1"], order_by=["start_time"])]

    assert statuses() == ["FINISHED", "RUNNING"]
    assert okddip("task=report").code == 0
    assert statuses() == ["FINISHED", "KILLED"]


@pytest.mark.slow
def test_a_run_whose_server_is_away_at_its_end_is_finished_by_the_next_command(
    okddip: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    server = f"tracking.uri=http://127.0.0.1:{port}"
    monkeypatch.setattr(outbox, "FINISH_SECONDS", 1.0)
    with mlflow_server(tmp_path, port) as process:
        part = MLflow.log

        def last_epoch(self: MLflow, metrics: dict[str, float], epoch: int, *rest: int) -> None:
            if epoch == 1:
                os.killpg(process.pid, signal.SIGKILL)
            part(self, metrics, epoch, *rest)

        monkeypatch.setattr(MLflow, "log", last_epoch)
        answer = okddip(*SMALL, server)
        monkeypatch.undo()
    assert answer.code == 0, answer.err
    [kept] = tmp_path.glob("outputs/*/*/unsent-*.json")
    assert str(kept) in answer.out + answer.err
    with mlflow_server(tmp_path, port):
        client = mlflow.MlflowClient(server.partition("=")[2])
        assert [run.info.status for run in client.search_runs(["1"])] == ["RUNNING"]
        assert okddip("task=report", server).code == 0
        [run] = client.search_runs(["1"])
        assert run.info.status == "FINISHED"
        lines = [json.loads(line) for line in (kept.parent / "metrics.jsonl").read_text().splitlines()]
        assert run.data.metrics["final/top1"] == lines[-1]["test/top1"]
        assert [
            (point.step, point.timestamp, point.value)
            for point in client.get_metric_history(run.info.run_id, "test/top1")
        ] == [(line["epoch"], line["timestamp_ms"], line["test/top1"]) for line in lines]
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files >= {"last.pt", "best.pt", "metrics.jsonl", "config.yaml"}
    assert not kept.exists()
