"""One job of a sweep, from its beginning to what became of it."""

from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from program import Program
from sweep_helpers import SMALL, Okddip, outcomes, runs

from okddip.training import checkpoint
from okddip.training.trainer import Trainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "last.pt")["group"]


def are_the_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_sweep_runs_all_jobs_and_says_what_became_of_them(okddip: Okddip, tmp_path: Path) -> None:
    command = ("-m", *SMALL, "method.peers=2,3", "optimizer.lr=1e30,0.02", "trainer.epochs=2")
    answer = okddip(*command, "hydra.sweep.dir=sweep")
    assert answer.code == 1, answer.err
    kinds = ["skipped", "failed", "skipped", "finished"]
    assert outcomes(tmp_path / "sweep") == list(enumerate(kinds))
    *_, summary, first, second, failed, hint = answer.out.splitlines()
    assert summary == "Sweep method.peers x optimizer.lr, 4 jobs: 2 skipped, 1 failed, 1 finished."
    assert first.startswith("skipped #0 optimizer.lr=1e+30 method.peers=2: method.peers=2: OKDDip takes at")
    assert second.startswith("skipped #2 optimizer.lr=0.02 method.peers=2: ")
    assert failed.startswith("failed #1 optimizer.lr=1e+30 method.peers=3: Epoch ")
    assert "The same command again" in hint

    [parent] = runs(tmp_path, "parents")
    assert parent.info.status == "FAILED"
    assert parent.info.run_name == "method.peers x optimizer.lr"
    assert parent.data.params["sweep.method.peers"] == "2,3"
    assert parent.data.tags.items() >= {
        *(("method", "okddip"), ("model", "resnet8"), ("dataset", "digits"), ("structure", "branch")),
        *(("peers", "2,3"), ("seed", "0"), ("sweep", "method.peers x optimizer.lr")),
    }
    assert [run.info.status for run in runs(tmp_path)] == ["FAILED", "FINISHED"]
    names = [f"lr={lr} okddip3-seed0-branch-resnet8-digits" for lr in ("1e+30", "0.02")]
    assert [run.info.run_name for run in runs(tmp_path)] == names
    for run in runs(tmp_path):
        assert run.data.tags.items() >= {
            *(("method", "okddip"), ("model", "resnet8"), ("dataset", "digits"), ("structure", "branch")),
            *(("peers", "3"), ("seed", "0"), ("sweep", "method.peers x optimizer.lr")),
            ("mlflow.parentRunId", parent.info.run_id),
        }
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert [file.path for file in client.list_artifacts(parent.info.run_id) if file.is_dir] == ["report"]

    # again, in another place: what is finished is left alone
    again = okddip(*command, "hydra.sweep.dir=again")
    assert again.code == 1
    assert outcomes(tmp_path / "again")[1:] == [(1, "failed"), (2, "skipped"), (3, "finished before")]
    assert f"finished before, as MLflow run {runs(tmp_path)[1].info.run_id}" in again.out
    assert [run.info.run_id for run in runs(tmp_path, "parents")] == [parent.info.run_id]
    assert len(runs(tmp_path)) == 2

    # unless it is forced
    forced = okddip(
        "-m", *SMALL, "method.peers=3", "optimizer.lr=0.02,0.03", "trainer.epochs=2", "trainer.rerun=true"
    )
    assert forced.code == 0, forced.err
    assert len(runs(tmp_path)) == 4
    assert {run.info.status for run in runs(tmp_path, "parents")} == {"FAILED", "FINISHED"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tracking", "places"),
    [("tracking=none", ("multirun/0", "multirun/1")), ("tracking=mlflow", ("here", "else/where"))],
    ids=["beside it", "found in the store"],
)
def test_a_job_that_is_cut_off_goes_on(
    okddip: Okddip, monkeypatch: pytest.MonkeyPatch, tracking: str, places: tuple[str, str]
) -> None:
    whole = Trainer.train_epoch

    def part(self: Trainer, *arguments: Any) -> Any:
        if arguments[-1] == 1:
            raise RuntimeError("the power went")
        return whole(self, *arguments)

    command = ("-m", *SMALL, "method=baseline", tracking, "seed=0,1", "trainer.epochs=2")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", part)
        cut = okddip(*command, f"hydra.sweep.dir={places[0]}")
    assert cut.code == 1
    assert "failed #1 seed=1: RuntimeError: the power went" in cut.out
    answer = okddip(*command, f"hydra.sweep.dir={places[1]}")
    assert answer.code == 0, answer.err
    assert answer.out.count("resumes after epoch 1") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "methods"),
    [(False, ("okddip", "kd")), (True, ("okddip",))],
    ids=["eager", "compiled"],
)
def test_a_job_gives_the_weights_that_it_gives_alone(
    okddip: Okddip, tmp_path: Path, compiled: bool, methods: tuple[str, ...]
) -> None:
    common = (
        *SMALL,
        "tracking=none",
        "trainer.epochs=2",
        "methods.teacher=auto",
        "methods.teacher_model=resnet14",
    )
    common += (f"trainer.compile={compiled}",)
    for method in methods:
        alone = Program(tmp_path, *common, f"method={method}", "seed=1", f"hydra.run.dir=alone-{method}")
        output, _ = alone.communicate(timeout=300)
        assert alone.returncode == 0, output
    if "kd" in methods:
        (tmp_path / "outputs").rename(tmp_path / "the teacher that was trained with it")

    answer = okddip(
        *("-m", *common, f"method=dml,{','.join(methods)}", "seed=1", "hydra.sweep.dir=sweep"),
        "hydra.sweep.subdir=${options.method}${seed}",
    )
    assert answer.code == 0, answer.err
    for method in methods:
        assert are_the_same(weights(tmp_path / "sweep" / f"{method}1"), weights(tmp_path / f"alone-{method}"))


def test_going_on_and_training_anew_at_once_is_refused(okddip: Okddip) -> None:
    answer = okddip("-m", *SMALL, "seed=0,1", "trainer.rerun=true", "trainer.resume=auto", "tracking=none")
    assert answer.code == 1
    assert "2 jobs: 2 failed" in answer.out
    assert "trainer.rerun=true, trainer.resume=auto: the first trains anew" in answer.out
