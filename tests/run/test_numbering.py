"""Epochs count from 1 where people look; a run that an older version began goes on as it began."""

import json
from pathlib import Path

import mlflow
import pytest
import torch
from run_helpers import TINY, Okddip, assert_told_once, cut_off, lines_of, the_run

import okddip as package
from okddip.older_versions import FIRST_EPOCH
from okddip.training import checkpoint


def make_older(folder: Path) -> None:
    """Let a run be as an older version left it: counted from 0, and silent about it."""
    for path in folder.glob("*.pt"):
        state = checkpoint.load(path)
        if FIRST_EPOCH in state:  # else it is another name of a file that was changed already
            del state[FIRST_EPOCH]
            state["config"]["trainer"].pop("threads", None)
            torch.save(state, path)
    lines = [line | {"epoch": line["epoch"] - 1} for line in lines_of(folder)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = json.loads((folder / "run.json").read_text())
    del facts[FIRST_EPOCH]
    (folder / "run.json").write_text(json.dumps(facts))


def test_a_run_of_an_older_version_goes_on_counting_from_0_and_is_read_from_1(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=2)
        assert okddip(*TINY, "tracking=none", "hydra.run.dir=run").code == 1
    assert [line["epoch"] for line in lines_of(folder)] == [1, 2]
    make_older(folder)
    answer = okddip(*TINY, "hydra.run.dir=run", "trainer.resume=auto")
    assert answer.code == 0, answer.err
    assert "resumes after epoch 2" in answer.out

    assert [line["epoch"] for line in lines_of(folder)] == [0, 1, 2, 3]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = the_run(client)
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "test/top1")]
    assert sorted(steps) == [0, 1, 2, 3]
    assert run.data.tags[FIRST_EPOCH] == "0"
    best = checkpoint.load(folder / "last.pt")["history"]["best"]["epoch"]
    assert float(run.data.tags["best.epoch"]) == best

    assert list(package.history(run.info.run_id, "test/top1").index) == [1, 2, 3, 4]
    assert package.runs().loc[run.info.run_id, "best/epoch"] == best + 1


@pytest.mark.slow
def test_a_copied_checkpoint_brings_its_numbering_along(
    okddip: Okddip, tmp_path: Path, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=2)
        assert okddip(*TINY, "tracking=none", "hydra.run.dir=cut").code == 1
    (tmp_path / "copy").mkdir()
    for name in ("last.pt", "best.pt", "metrics.jsonl"):
        (tmp_path / "cut" / name).rename(tmp_path / "copy" / name)
    assert okddip(*TINY, "hydra.run.dir=run", "trainer.resume=copy/last.pt").code == 0
    assert_told_once(client, tmp_path / "run")
    assert the_run(client).data.tags[FIRST_EPOCH] == "1"
