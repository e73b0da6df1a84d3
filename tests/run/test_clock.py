"""A run's times only grow, whatever the clock does: MLflow shows the newest of what it was told."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from conftest import Answer
from mlflow.entities import Run

from okddip.run.folder import RunFolder
from okddip.training import checkpoint

Okddip = Callable[..., Answer]
SMALL = (
    *("dataset=digits", "model=resnet8", "method=baseline", "trainer.limit_batches=1", "optimizer.lr=0.02"),
    "hydra.run.dir=run",
)
DAY = 86_400


def set_clock_back(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[], float]) -> None:
    """Let the clock of this process, MLflow's within it too, show a time before the true one."""
    true_ns = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: true_ns() - int(seconds() * 1e9))
    monkeypatch.setattr(time, "time", lambda: true_ns() / 1e9 - seconds())


def only_run(folder: Path) -> Run:
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("okddip")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    return run


def times(folder: Path) -> list[int]:
    return [timestamp_ms for _, timestamp_ms, _ in RunFolder(folder).read_metrics()]


@pytest.mark.slow
def test_a_run_made_longer_where_the_clock_is_behind_has_its_new_result(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert okddip(*SMALL, "trainer.epochs=2").code == 0
    before = only_run(tmp_path)
    with monkeypatch.context() as patch:
        set_clock_back(patch, lambda: DAY)
        answer = okddip(*SMALL, "trainer.epochs=6", "trainer.resume=run")
    assert answer.code == 0, answer.err
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    after = only_run(tmp_path)
    assert after.data.metrics["final/top1"] == last["test/top1"] != before.data.metrics["final/top1"]
    state = checkpoint.load(Path("run/last.pt"))
    assert float(after.data.tags["best.epoch"]) == state["history"]["best"]["epoch"] + 1
    assert times(Path("run")) == sorted(set(times(Path("run"))))
    assert state["timestamp_ms"] == times(Path("run"))[-1]
    assert after.info.end_time >= max(before.info.end_time, state["timestamp_ms"])


def test_a_clock_that_goes_back_during_a_run_leaves_its_times_in_order(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = time.monotonic()
    with monkeypatch.context() as patch:
        set_clock_back(patch, lambda: 1000 * (time.monotonic() - begun))
        assert okddip(*SMALL, "trainer.epochs=3").code == 0
    assert times(Path("run")) == sorted(set(times(Path("run"))))
    run = only_run(tmp_path)
    assert run.info.end_time >= max(run.info.start_time, *times(Path("run")))


def test_a_result_logged_again_keeps_its_time_and_an_older_files_times_do_not_hide_it(
    tmp_path: Path,
) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [{"epoch": epoch, "timestamp_ms": when} for epoch, when in enumerate((100, 200, 50, 60))]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    assert RunFolder(tmp_path).result_timestamp() == 200
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert RunFolder(tmp_path).result_timestamp() == 201
