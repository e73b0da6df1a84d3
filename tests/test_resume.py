"""Runs that are cut off go on as if nothing had happened."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from conftest import Answer

from okddip import checkpoint
from okddip.trainer import Trainer

Okddip = Callable[..., Answer]
REPOSITORY = Path(__file__).parents[1]
SMALL = (
    "dataset=digits",
    "model=resnet8",
    "trainer.epochs=4",
    "trainer.limit_batches=3",
    "optimizer.lr=0.02",
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load(folder / "last.pt")
    assert state["epoch"] == state["config"]["trainer"]["epochs"] - 1
    moments = {
        f"{name}{index}": value
        for index, values in state["optimizer"]["state"].items()
        for name, value in values.items()
    }
    return {**state["group"], **state["method"], **moments}


def are_the_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def cut_off(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Let training end with an exception in the middle of an epoch."""
    whole = Trainer.train_epoch

    def part(self: Trainer, *arguments: Any) -> Any:
        if arguments[-1] == epoch:
            raise RuntimeError("the power went")
        return whole(self, *arguments)

    monkeypatch.setattr(Trainer, "train_epoch", part)


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=okddip", "scheduler.milestones=[0.5]"],
        ["method=okddip", "method.structure=network", "method.peers=3", "trainer.precision=bf16"],
        ["method=baseline", "optimizer=adamw", "optimizer.lr=0.001", "trainer.gradient_clip=1"],
        ["method=independent"],
        ["method=dml", "scheduler=cosine"],
        ["method=cl_ilr"],
        ["method=one", "trainer.precision=bf16"],
        ["method=kd", "method.teacher=teacher/last.pt"],
        ["method=okddip", "model=densenet40_12", "model.dropout=0.2", "trainer.epochs=2"],
        pytest.param(
            ["method=okddip", "trainer.precision=bf16", "trainer.compile=true"], marks=pytest.mark.slow
        ),
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
    assert "goes on after epoch 1" in answer.out
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
        file.write('{"epoch": 2, "timestamp_ms": 1, "train/loss": 9')  # a line that was being written
    assert okddip(*SMALL, "trainer.resume=auto").code == 0

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("okddip").experiment_id])
    assert run.info.status == "FINISHED"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    for name in set(lines[0]) - {"epoch", "timestamp_ms"}:
        logged = client.get_metric_history(run.info.run_id, name)
        assert [(m.step, m.timestamp, m.value) for m in sorted(logged, key=lambda m: m.step)] == [
            (line["epoch"], line["timestamp_ms"], line[name]) for line in lines
        ], name
    for name in ("final/top1", "best/top1", "best/epoch"):
        assert len(client.get_metric_history(run.info.run_id, name)) == 1


def test_a_finished_run_is_not_trained_again(okddip: Okddip, tmp_path: Path) -> None:
    assert okddip(*SMALL, "tracking=none").code == 0
    [folder] = (tmp_path / "outputs").glob("*/*")
    before = (folder / "last.pt").read_bytes()
    answer = okddip(*SMALL, "tracking=none", "trainer.resume=auto")
    assert answer.code == 0
    assert "leader *" in answer.out
    assert (folder / "last.pt").read_bytes() == before


def test_another_configuration_is_another_run(okddip: Okddip, tmp_path: Path) -> None:
    assert okddip(*SMALL, "tracking=none").code == 0
    answer = okddip(*SMALL, "tracking=none", "optimizer.momentum=0.8", "trainer.resume=auto")
    assert "a new one" in answer.out
    assert len(list((tmp_path / "outputs").glob("*/*/last.pt"))) == 2


def test_going_on_with_other_settings_is_refused_with_the_differences(okddip: Okddip) -> None:
    assert okddip(*SMALL, "tracking=none", "hydra.run.dir=run").code == 0
    answer = okddip(*SMALL, "tracking=none", "trainer.resume=run/last.pt", "optimizer.lr=0.01", "seed=2")
    assert answer.code == 1
    assert "optimizer.lr: 0.02 there, 0.01 here" in answer.err
    assert "seed: 0 there, 2 here" in answer.err
    assert "trainer.epochs: " not in answer.err


@pytest.mark.parametrize("by_id", [False, True])
def test_more_epochs_go_on_in_the_same_run(okddip: Okddip, tmp_path: Path, by_id: bool) -> None:
    tracking = "mlflow" if by_id else "none"
    assert okddip(*SMALL, f"tracking={tracking}", "hydra.run.dir=run").code == 0
    reference = "run"
    if by_id:
        reference = f"runs:/{json.loads((tmp_path / 'run' / 'run.json').read_text())['tracking_id']}"
    longer = [part.replace("epochs=4", "epochs=6") for part in SMALL]
    answer = okddip(*longer, f"tracking={tracking}", f"trainer.resume={reference}")
    assert answer.code == 0, answer.err
    assert checkpoint.load(tmp_path / "run" / "last.pt")["epoch"] == 5
    if by_id:
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        run = client.get_run(reference.removeprefix("runs:/"))
        assert run.data.params["trainer.epochs"] == "4"
        assert run.data.tags["resumed.trainer.epochs"] == "6"
        assert len(client.get_metric_history(run.info.run_id, "test/top1")) == 6


def test_a_longer_run_that_was_cut_off_is_found_again(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert okddip(*SMALL, "tracking=none", "hydra.run.dir=runs/run").code == 0
    longer = [*(part.replace("epochs=4", "epochs=6") for part in SMALL), "tracking=none"]
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=5)
        assert okddip(*longer, "trainer.resume=runs/run", "hydra.run.dir=runs/second").code == 1
    answer = okddip(*longer, "trainer.resume=auto", "hydra.run.dir=runs/third")
    assert "goes on after epoch 5" in answer.out
    assert checkpoint.load(tmp_path / "runs" / "run" / "last.pt")["epoch"] == 5


def test_a_loss_that_is_not_finite_in_an_evaluation_leaves_no_checkpoint(
    okddip: Okddip, tmp_path: Path
) -> None:
    small = ("dataset=digits", "model=resnet8", "method=baseline", "trainer.epochs=1", "tracking=none")
    answer = okddip(*small, "trainer.limit_batches=1", "optimizer.lr=1e30", "hydra.run.dir=run")
    assert answer.code == 1
    assert "Epoch 1: loss, hard_loss is not finite" in answer.err
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_run_that_began_without_tracking_goes_on_with_it(okddip: Okddip, tmp_path: Path) -> None:
    assert okddip(*SMALL, "tracking=none", "hydra.run.dir=run").code == 0
    answer = okddip(*SMALL, "hydra.run.dir=run", "trainer.resume=auto")
    assert answer.code == 0, answer.err
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("okddip").experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "test/top1")) == 4


def test_a_run_that_still_runs_is_not_taken_up(okddip: Okddip, tmp_path: Path) -> None:
    from okddip.resume import lock

    assert okddip(*SMALL, "tracking=none", "hydra.run.dir=run").code == 0
    with lock(tmp_path / "run"):
        answer = okddip(*SMALL, "tracking=none", "hydra.run.dir=run", "trainer.resume=auto")
    assert answer.code == 1
    assert "still running in another process" in answer.err


def test_a_requeued_slurm_job_goes_on_by_itself(
    okddip: Okddip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=1)
        assert okddip(*SMALL, "tracking=none").code == 1
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "goes on after epoch 1" in okddip(*SMALL, "tracking=none").out


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "okddip.main", *overrides]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell lets its background jobs ignore Ctrl-C, and so would the run if the tests are such a job
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_ends_a_run_properly_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    long = [part.replace("epochs=4", "epochs=10000") for part in SMALL]
    process = start(tmp_path, *long)
    wait_for(tmp_path, "outputs/*/*/last.pt", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    expected = shlex.join(["okddip", *long, "trainer.resume=auto"])
    assert output.strip().splitlines()[-1] == f"Stopped. Go on with: {expected}"
    [last] = tmp_path.glob("outputs/*/*/last.pt")
    checkpoint.load(last)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("okddip").experiment_id])
    assert run.info.status == "KILLED"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "overrides"),
    [
        (12, ["method=okddip", "trainer.precision=bf16"]),
        (8, ["method=one", "trainer.limit_batches=2", "tracking=none"]),
    ],
)
def test_a_run_killed_many_times_at_random_moments_ends_as_if_never_killed(
    tmp_path: Path, kills: int, overrides: list[str]
) -> None:
    command = [*(part.replace("epochs=4", "epochs=60") for part in SMALL), *overrides]
    whole = start(tmp_path, *command, "hydra.run.dir=whole/run")
    whole.communicate(timeout=600)
    assert whole.returncode == 0

    moments = random.Random(0)
    killed = 0
    while killed < kills:
        process = start(tmp_path, *command, "trainer.resume=auto")
        if killed % 2:  # while epochs pass and checkpoints are written; else anywhere, start-up included
            wait_for(tmp_path, "outputs/*/*/last.pt", process)
            lines = [path.stat().st_mtime_ns for path in tmp_path.glob("outputs/*/*/metrics.jsonl")]
            while process.poll() is None and lines == [
                path.stat().st_mtime_ns for path in tmp_path.glob("outputs/*/*/metrics.jsonl")
            ]:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.1))
        else:
            time.sleep(moments.uniform(0.5, 8))
        assert process.poll() is None, "finished before it could be killed: make the run longer"
        process.kill()
        process.communicate()
        killed += 1
    last = start(tmp_path, *command, "trainer.resume=auto")
    output, _ = last.communicate(timeout=600)
    assert last.returncode == 0, output
    [folder] = {path.parent for path in tmp_path.glob("outputs/*/*/last.pt")}
    assert are_the_same(weights(tmp_path / "whole" / "run"), weights(folder))
    lines = [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(60))
    if "tracking=none" not in overrides:
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        run_id = json.loads((folder / "run.json").read_text())["tracking_id"]
        assert client.get_run(run_id).info.status == "FINISHED"
        logged = client.get_metric_history(run_id, "test/top1")
        assert sorted(metric.step for metric in logged) == list(range(60))
