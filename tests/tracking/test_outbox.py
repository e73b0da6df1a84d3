"""Stores that go away, and what was to be sent to them."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from mlflow_stores import free_port, history, mlflow_server, start, stored, text_of, without_artifacts

from okddip.signals import stop_on_signals
from okddip.tracking import outbox
from okddip.tracking.tracker import MLflow


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
