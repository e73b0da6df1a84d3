"""The attention of a run: a file and a figure, and no metrics."""

from pathlib import Path

import mlflow_stores
import numpy as np
import pandas as pd

from okddip.tasks.attention import ENTRY, FILE, TAG, write_attention
from okddip.tasks.report.attention import entry_names, read_attention, save_matrices
from okddip.tracking.tracker import MLflow

MATRICES = [np.array([[0.9, 0.1], [0.4, 0.6]]), np.array([[0.8, 0.2], [0.3, 0.7]])]
EPOCHS = [
    (
        epoch,
        1_000 + epoch,
        {"test/top1": 50.0}
        | {f"test/attention/{asks}/{asked}": matrix[asks, asked] for asks in (0, 1) for asked in (0, 1)},
    )
    for epoch, matrix in enumerate(MATRICES, start=1)
]


def test_attention_is_a_file_that_reports_read_and_no_metrics(tracker: MLflow, tmp_path: Path) -> None:
    mlflow_stores.start(tracker)
    for epoch, timestamp_ms, results in EPOCHS:
        tracker.log(results, epoch, timestamp_ms)
    matrices = write_attention(EPOCHS, tmp_path)
    assert list(matrices) == [1, 2]
    assert all(np.array_equal(matrices[number], MATRICES[number - 1]) for number in (1, 2))
    assert pd.read_csv(tmp_path / FILE).iloc[1].to_dict() == {
        **{"epoch": 1, "split": "test", "asks": 0, "is_asked": 1, "weight": 0.1}
    }
    tracker.log_artifact(tmp_path / FILE)
    tracker.set_tags({TAG: "2x2"})
    run = mlflow_stores.stored(tracker)
    assert run.data.metrics == {"test/top1": 50.0}
    assert entry_names(run) == [f"test/attention/{asks}/{asked}" for asks in (0, 1) for asked in (0, 1)]
    series = read_attention(tracker.store.client, run)
    assert series["test/attention/1/0"].to_dict() == {1: 0.4, 2: 0.3}

    save_matrices({"0": matrices}, "a run", tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 1_000


def test_a_run_without_attention_has_no_file(tmp_path: Path) -> None:
    assert write_attention([(1, 1_000, {"test/top1": 50.0})], tmp_path) == {}
    assert not (tmp_path / FILE).exists()
    assert ENTRY.fullmatch("test/top1") is None
