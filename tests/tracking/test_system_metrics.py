"""The load of the machine, logged by MLflow's own thread."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from mlflow_stores import free_port, history, mlflow_server, start

from okddip.errors import ConfigError
from okddip.tracking import system_metrics
from okddip.tracking.tracker import MLflow


def test_system_metrics_are_off_unless_asked_for(tracker: MLflow) -> None:
    start(tracker)
    tracker.watch_system()
    assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}


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
