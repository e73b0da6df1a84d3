"""Runs that are given more epochs than they began with."""

import json
import shutil
from pathlib import Path

import mlflow
import pytest
import torch
from conftest import quick_first
from run_helpers import (
    BARE,
    SMALL,
    Okddip,
    are_the_same,
    cut_off,
    lengthened,
    weights,
)

from okddip.training import checkpoint


@pytest.mark.parametrize("by_id", quick_first(False, True))
def test_more_epochs_go_on_in_the_same_run(okddip: Okddip, tmp_path: Path, by_id: bool) -> None:
    tracking = "mlflow" if by_id else "none"
    assert okddip(*SMALL, f"tracking={tracking}", "hydra.run.dir=run").code == 0
    reference = "run"
    if by_id:
        reference = f"runs:/{json.loads((tmp_path / 'run' / 'run.json').read_text())['tracking_id']}"
    longer = lengthened(SMALL)
    answer = okddip(*longer, f"tracking={tracking}", f"trainer.resume={reference}")
    assert answer.code == 0, answer.err
    assert checkpoint.load(tmp_path / "run" / "last.pt")["epoch"] == 5
    if by_id:
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        run = client.get_run(reference.removeprefix("runs:/"))
        assert run.data.params["trainer.epochs"] == "4"
        assert run.data.tags["resumed.trainer.epochs"] == "6"
        assert len(client.get_metric_history(run.info.run_id, "test/top1")) == 6


@pytest.mark.slow
def test_a_longer_run_that_was_cut_off_is_found_again(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert okddip(*SMALL, "tracking=none", "hydra.run.dir=runs/run").code == 0
    longer = [*lengthened(SMALL), "tracking=none"]
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=5)
        assert okddip(*longer, "trainer.resume=runs/run", "hydra.run.dir=runs/second").code == 1
    answer = okddip(*longer, "trainer.resume=auto", "hydra.run.dir=runs/third")
    assert "resumes after epoch 5" in answer.out
    assert checkpoint.load(tmp_path / "runs" / "run" / "last.pt")["epoch"] == 5


@pytest.mark.parametrize("value", ["2.5", "null"])
def test_a_length_that_is_no_number_is_refused_by_name(okddip: Okddip, value: str) -> None:
    assert okddip(*BARE, "hydra.run.dir=run", "trainer.epochs=1").code == 0
    answer = okddip(*BARE, f"trainer.epochs={value}", "trainer.resume=run")
    assert answer.code == 1
    assert ": must be a whole number at least 1" in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("scheduler=cosine", "learning rate"),
        pytest.param("scheduler.milestones=[0.5]", "learning rate", marks=pytest.mark.slow),
        pytest.param("scheduler.warmup_epochs=0.5", "learning rate", marks=pytest.mark.slow),
        pytest.param("method.ramp_epochs=0.5", "ramp", marks=pytest.mark.slow),
    ],
)
def test_a_run_whose_finished_epochs_depend_on_its_length_is_not_lengthened(
    okddip: Okddip, tmp_path: Path, override: str, what: str
) -> None:
    command = (*SMALL, "tracking=none", f"method={'one' if what == 'ramp' else 'baseline'}", override)
    assert okddip(*command, "hydra.run.dir=runs/run").code == 0
    shutil.copy(tmp_path / "runs/run/last.pt", tmp_path / "copy.pt")
    before = {path.name: path.read_bytes() for path in (tmp_path / "runs" / "run").glob("*.pt")}
    for reference in ("runs/run", "copy.pt"):
        answer = okddip(*lengthened(command), f"trainer.resume={reference}", "hydra.run.dir=runs/new")
        assert answer.code == 1
        assert f"was begun with trainer.epochs=4, which sets its {what}, so" in answer.err
        assert "Traceback" not in answer.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "runs" / "run").glob("*.pt")} == before
    assert not (tmp_path / "runs" / "new" / "run.json").exists()
    answer = okddip(*command, "trainer.resume=auto", "hydra.run.dir=runs/unused")  # it is still what it was
    assert "is finished after epoch 4" in answer.out


@pytest.mark.slow
def test_a_run_is_lengthened_while_its_finished_epochs_are_those_of_the_longer_run(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*BARE, "scheduler.milestones=[0.5]")
    assert okddip(*lengthened(command), "hydra.run.dir=whole/run").code == 0
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=1)
        assert okddip(*command, "hydra.run.dir=runs/run").code == 1
    answer = okddip(*lengthened(command), "trainer.resume=runs/run")
    assert answer.code == 0, answer.err
    assert are_the_same(weights(tmp_path / "whole" / "run"), weights(tmp_path / "runs" / "run"))


def test_a_run_that_an_older_version_lengthened_is_evaluated_and_not_resumed(
    okddip: Okddip, tmp_path: Path
) -> None:
    assert okddip(*BARE, "hydra.run.dir=runs/run").code == 0
    state = checkpoint.load(tmp_path / "runs" / "run" / "last.pt")
    torch.save(state | {"lengths": [2]}, tmp_path / "runs" / "run" / "last.pt")
    answer = okddip(*BARE, "trainer.resume=runs/run")
    assert answer.code == 1
    assert "lengthened this run, although its learning rate or ramp depend on its length" in answer.err
    assert okddip("task=evaluate", "checkpoint=runs/run", "tracking=none").code == 0


@pytest.mark.slow
def test_a_run_that_was_made_longer_is_no_more_the_shorter_one(okddip: Okddip, tmp_path: Path) -> None:
    longer = lengthened(BARE)
    assert okddip(*BARE, "hydra.run.dir=runs/run").code == 0
    assert okddip(*longer, "hydra.run.dir=runs/unused", "trainer.resume=runs/run").code == 0
    assert "is finished" in okddip(*longer, "hydra.run.dir=runs/unused", "trainer.resume=auto").out
    assert "A new run: " in okddip(*BARE, "hydra.run.dir=runs/short", "trainer.resume=auto").out
    assert checkpoint.load(tmp_path / "runs" / "run" / "last.pt")["epoch"] == 5
    answer = okddip(*BARE, "trainer.resume=runs/run")
    assert answer.code == 1
    assert "trainer.epochs: 6 there, 4 here" in answer.err
