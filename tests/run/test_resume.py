"""Runs that are cut off go on as if nothing had happened."""

import json
import shutil
from pathlib import Path

import mlflow
import pytest
from conftest import quick_first
from run_helpers import (
    BARE,
    SMALL,
    STREAMED,
    TINY,
    Okddip,
    are_the_same,
    assert_told_once,
    cut_off,
    draw_folders,
    lines_of,
    the_run,
    weights,
)

# bf16 is emulated where a CPU does not have it
FEW = ("trainer.epochs=2", "trainer.limit_batches=2", "trainer.batch_size=16", "trainer.eval_batch_size=16")


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=okddip", "scheduler.milestones=[0.5]"],
        pytest.param(
            [*FEW, "method=okddip", "method.structure=network", "method.peers=3", "trainer.precision=bf16"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["method=baseline", "optimizer=adamw", "optimizer.lr=0.001", "trainer.gradient_clip=1"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["method=independent"], marks=pytest.mark.slow),
        pytest.param(["method=dml", "scheduler=cosine"], marks=pytest.mark.slow),
        pytest.param(["method=cl_ilr"], marks=pytest.mark.slow),
        pytest.param(["method=kd", "method.teacher=teacher/last.pt"], marks=pytest.mark.slow),
        pytest.param(
            ["method=okddip", "model=densenet40_12", "model.dropout=0.2", "trainer.epochs=2"],
            marks=pytest.mark.slow,
        ),
        pytest.param([*FEW, "method=one", "trainer.precision=bf16"], marks=pytest.mark.slow),
        pytest.param(
            [*FEW, "method=okddip", "trainer.precision=bf16", "trainer.compile=true"], marks=pytest.mark.slow
        ),
        pytest.param([*FEW, "method=one", "trainer.compile=true"], marks=pytest.mark.slow),
        pytest.param(
            ["method=kdcl", "method.structure=branch", "trainer.accumulate=2"], marks=pytest.mark.slow
        ),
        ["method=pcl"],
        pytest.param(["method=dml", "method.ema_decay=0.9", "optimizer=adamw"], marks=pytest.mark.slow),
        pytest.param([*FEW, "method=ffl", "trainer.compile=true"], marks=pytest.mark.slow),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    if "method=kd" in overrides:
        assert okddip(*SMALL, "tracking=none", "method=baseline", "hydra.run.dir=teacher").code == 0
    command = [*SMALL, "tracking=none", *overrides]
    assert okddip(*command, "hydra.run.dir=runs/whole").code == 0
    (tmp_path / "runs" / "whole" / "run.json").unlink()  # else it is the run that is found
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=1)
        assert okddip(*command, "hydra.run.dir=runs/cut").code == 1
    answer = okddip(*command, "hydra.run.dir=runs/again", "trainer.resume=auto")
    assert answer.code == 0, answer.err
    assert "resumes after epoch 1" in answer.out
    assert not (tmp_path / "runs" / "again" / "last.pt").exists()
    assert are_the_same(weights(tmp_path / "runs" / "whole"), weights(tmp_path / "runs" / "cut"))


def test_a_resumed_run_has_every_metric_once_in_the_same_mlflow_run(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=2)
        assert okddip(*SMALL).code == 1
    [folder] = (tmp_path / "outputs").glob("*/*")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "timestamp_ms": 1, "train/loss": 9')  # a line that was being written
    assert okddip(*SMALL, "trainer.resume=auto").code == 0

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("okddip").experiment_id])
    assert run.info.status == "FINISHED"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    for name in (name for name in set(lines[0]) - {"epoch", "timestamp_ms"} if "/attention/" not in name):
        logged = client.get_metric_history(run.info.run_id, name)
        assert [(m.step, m.timestamp, m.value) for m in sorted(logged, key=lambda m: m.step)] == [
            (line["epoch"], line["timestamp_ms"], line[name]) for line in lines
        ], name
    for name in ("final/top1", "best/top1"):
        assert len(client.get_metric_history(run.info.run_id, name)) == 1


@pytest.mark.slow
def test_a_run_that_began_without_tracking_goes_on_with_it(okddip: Okddip, tmp_path: Path) -> None:
    assert okddip(*SMALL, "tracking=none", "hydra.run.dir=run").code == 0
    answer = okddip(*SMALL, "hydra.run.dir=run", "trainer.resume=auto")
    assert answer.code == 0, answer.err
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("okddip").experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "test/top1")) == 4


@pytest.mark.slow
def test_an_epoch_whose_checkpoint_was_damaged_is_not_told_of_twice(
    okddip: Okddip, tmp_path: Path, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert okddip(*BARE, "hydra.run.dir=whole/run").code == 0
    folder = tmp_path / "runs" / "run"
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=3)
        assert okddip(*TINY, "hydra.run.dir=runs/run").code == 1
    before = (folder / "metrics.jsonl").read_text()
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:-1000])
    with monkeypatch.context() as patch:  # and once more, now with a whole checkpoint of the epoch before
        cut_off(patch, epoch=2)
        assert okddip(*TINY, "hydra.run.dir=runs/run", "trainer.resume=auto").code == 1
    answer = okddip(*TINY, "hydra.run.dir=runs/run", "trainer.resume=auto")
    assert "resumes after epoch 2" in answer.out
    assert (folder / "metrics.jsonl").read_text().startswith(before)
    assert_told_once(client, folder)
    assert are_the_same(weights(tmp_path / "whole" / "run"), weights(folder))


@pytest.mark.parametrize("left", quick_first('{"epoch": 1, "timestamp_ms": 1, "tra', "", "\0\0\0\0"))
def test_a_lost_line_comes_back_from_the_checkpoint(
    okddip: Okddip,
    tmp_path: Path,
    client: mlflow.MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    left: str,
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=2)
        assert okddip(*TINY, "hydra.run.dir=run").code == 1
    first, second = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(first + left)
    assert okddip(*TINY, "hydra.run.dir=run", "trainer.resume=auto").code == 0
    assert (folder / "metrics.jsonl").read_text().startswith(first + second)
    assert_told_once(client, folder)


@pytest.mark.slow
def test_a_copied_checkpoint_goes_on_as_a_new_run_with_its_history(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert okddip(*BARE, "hydra.run.dir=runs/run").code == 0
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=2)
        assert okddip(*BARE, "hydra.run.dir=runs/cut").code == 1
    (tmp_path / "usb").mkdir()
    for name in ("last.pt", "best.pt", "metrics.jsonl"):
        shutil.copy(tmp_path / "runs" / "cut" / name, tmp_path / "usb" / name)
    answer = okddip(*BARE, "hydra.run.dir=runs/copy", "trainer.resume=usb/last.pt")
    assert answer.code == 0, answer.err
    assert "resumes after epoch 2" in answer.out
    assert are_the_same(weights(tmp_path / "runs" / "run"), weights(tmp_path / "runs" / "copy"))
    assert lines_of(tmp_path / "runs" / "copy")[:2] == lines_of(tmp_path / "usb")
    assert len(lines_of(tmp_path / "runs" / "copy")) == 4
    assert (tmp_path / "runs" / "copy" / "best.pt").exists()

    shutil.copy(tmp_path / "runs" / "run" / "last.pt", tmp_path / "alone.pt")
    answer = okddip(*BARE, "hydra.run.dir=runs/alone", "trainer.resume=alone.pt")
    assert answer.code == 0, answer.err
    assert "is finished after epoch 4" in answer.out
    assert lines_of(tmp_path / "runs" / "alone") == lines_of(tmp_path / "runs" / "run")[3:]


@pytest.mark.slow
def test_a_store_that_was_deleted_in_between_is_told_everything_again(
    okddip: Okddip,
    tmp_path: Path,
    client: mlflow.MlflowClient,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=2)
        assert okddip(*TINY, "hydra.run.dir=run").code == 1
    first = the_run(client).info.run_id
    shutil.copy(empty_store, tmp_path / "new.db")
    answer = okddip(*TINY, "hydra.run.dir=run", "trainer.resume=run", "tracking.uri=sqlite:///new.db")
    assert answer.code == 1
    assert f"MLflow run {first}: cannot be resumed in tracking.uri=sqlite:///new.db" in answer.err
    assert f"begun in tracking.uri=sqlite:///{tmp_path}/mlflow.db" in answer.err

    note = tmp_path / "run" / "run.json"  # as if it had been begun in the store that lacks it now
    note.write_text(note.read_text().replace("mlflow.db", "new.db"))
    answer = okddip(*TINY, "hydra.run.dir=run", "trainer.resume=auto", "tracking.uri=sqlite:///new.db")
    assert answer.code == 0, answer.err
    assert f"MLflow run {first} is not, or no longer, in" in answer.out
    assert_told_once(mlflow.MlflowClient(f"sqlite:///{tmp_path}/new.db"), tmp_path / "run")


@pytest.mark.slow
def test_a_streamed_data_set_goes_on_where_it_was_cut_off(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_folders(tmp_path / "images")
    command = [*STREAMED, "tracking=none", "trainer.epochs=3"]
    assert okddip(*command, "dataset.workers=2", "hydra.run.dir=whole/run").code == 0
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=1)
        assert okddip(*command, "dataset.workers=2", "hydra.run.dir=runs/run").code == 1
    answer = okddip(*command, "dataset.workers=2", "hydra.run.dir=runs/run", "trainer.resume=auto")
    assert "resumes after epoch 1" in answer.out
    assert are_the_same(weights(tmp_path / "whole" / "run"), weights(tmp_path / "runs" / "run"))
