"""Runs that are stopped by signals, full disks and folders that go away."""

import json
import os
import pydoc
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from program import REPOSITORY, Program
from run_helpers import (
    BARE,
    SMALL,
    STREAMED,
    TINY,
    Okddip,
    are_the_same,
    assert_told_once,
    draw_folders,
    lines_of,
    the_run,
    wait_for,
    weights,
)

from okddip.tracking.tracker import MLflow
from okddip.training import checkpoint
from okddip.training.trainer import Trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        "okddip.data.dataset.Dataset.train_loader",
        "okddip.main.make",
        "okddip.tracking.tracker.MLflow._create_run",
        "okddip.tracking.outbox.Outbox.add",
        "okddip.training.checkpoint.link",
        "okddip.training.reporting.append_line",
        "okddip.tracking.tracker.MLflow.log_artifact",
        "okddip.tracking.tracker.MLflow.finish",
        "okddip.training.trainer.metrics.read",
    ],
)
def test_a_signal_at_any_moment_is_answered_and_costs_nothing(
    okddip: Okddip, tmp_path: Path, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    original = pydoc.locate(moment)
    assert callable(original)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(moment, original)
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    monkeypatch.setattr(moment, interrupted)
    answer = okddip(*TINY, "hydra.run.dir=run")
    assert answer.code == 143, answer.err
    expected = shlex.join(["okddip", *TINY, "hydra.run.dir=run", "trainer.resume=auto"])
    assert answer.out.splitlines()[-1] == f"Stopped. Resume with: {expected}"
    if client.get_experiment_by_name("okddip"):
        experiment = client.get_experiment_by_name("okddip").experiment_id
        assert {run.info.status for run in client.search_runs([experiment])} <= {"KILLED"}
    assert okddip(*TINY, "hydra.run.dir=run", "trainer.resume=auto").code == 0
    assert_told_once(client, tmp_path / "run")


def test_an_evaluation_is_stopped_by_a_signal_too(
    okddip: Okddip, tmp_path: Path, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert okddip(*BARE, "hydra.run.dir=run").code == 0
    monkeypatch.setattr("okddip.tasks.evaluate.task.measure", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert okddip("task=evaluate", "checkpoint=run").code == 143
    assert the_run(client).info.status == "KILLED"


def test_an_exception_after_a_signal_marks_the_run_killed(
    okddip: Okddip, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worker_gone(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            raise RuntimeError("DataLoader worker exited unexpectedly")

    monkeypatch.setattr(Trainer, "train_epoch", worker_gone)
    answer = okddip(*TINY, "hydra.run.dir=run")
    assert answer.code == 143
    assert "Stopped. Resume with: " in answer.out
    assert the_run(client).info.status == "KILLED"


@pytest.mark.slow
def test_a_folder_that_goes_away_is_named_and_the_run_goes_on_when_it_is_back(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert okddip(*BARE, "hydra.run.dir=whole/run").code == 0
    with monkeypatch.context() as patch:
        whole = Trainer.train_epoch

        def unplug(self: Trainer, *arguments: Any) -> Any:
            if arguments[-1] == 2:
                (tmp_path / "runs" / "run").rename(tmp_path / "unplugged")
            return whole(self, *arguments)

        patch.setattr(Trainer, "train_epoch", unplug)
        answer = okddip(*BARE, "hydra.run.dir=runs/run")
    assert answer.code == 1
    assert f"{tmp_path}/runs/run/last.pt: cannot be written (No such file or directory)" in answer.err
    (tmp_path / "unplugged").rename(tmp_path / "runs" / "run")
    assert okddip(*BARE, "hydra.run.dir=runs/run", "trainer.resume=auto").code == 0
    assert are_the_same(weights(tmp_path / "whole" / "run"), weights(tmp_path / "runs" / "run"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "name",
    [
        "last.pt",
        pytest.param("metrics.jsonl", marks=pytest.mark.slow),
        pytest.param("run.json", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_named_and_costs_nothing(
    okddip: Okddip, tmp_path: Path, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert okddip(*BARE, "hydra.run.dir=whole/run").code == 0
    folder = tmp_path / "run"
    victim = {"last.pt": "last.new", "metrics.jsonl": "metrics.jsonl", "run.json": "run.json.new"}[name]
    kept = tmp_path / "kept"
    with monkeypatch.context() as patch:
        whole = Trainer.train_epoch if name != "run.json" else MLflow._create_run

        def fill(*arguments: Any) -> Any:
            if name == "run.json" or arguments[-1] == 2:
                if (folder / victim).exists():
                    (folder / victim).rename(kept)
                (folder / victim).symlink_to("/dev/full")
            return whole(*arguments)

        patch.setattr(*((MLflow, "_create_run") if name == "run.json" else (Trainer, "train_epoch")), fill)
        answer = okddip(*TINY, "hydra.run.dir=run")
    assert answer.code == 1
    assert f"{folder}/{name}: cannot be written (No space left on device)" in answer.err
    (folder / victim).unlink(missing_ok=True)
    if kept.exists():
        kept.rename(folder / victim)
    answer = okddip(*TINY, "hydra.run.dir=run", "trainer.resume=auto")
    assert answer.code == 0, answer.err
    assert_told_once(client, folder)
    assert are_the_same(weights(tmp_path / "whole" / "run"), weights(folder))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_ends_a_run_with_workers_as_killed(
    tmp_path: Path, client: mlflow.MlflowClient, number: signal.Signals
) -> None:
    draw_folders(tmp_path / "images")
    process = Program(tmp_path, *STREAMED, "dataset.workers=2", "trainer.epochs=10000", "hydra.run.dir=run")
    wait_for(tmp_path, "run/previous.pt", process)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert output.strip().splitlines()[-1].startswith("Stopped. Resume with: okddip dataset=imagenet")
    assert "Traceback" not in output
    assert the_run(client).info.status == "KILLED"


SIGNAL_WHILE_WORKERS_START = """
import os
import signal
from okddip.main import cli

os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
cli()
"""


@pytest.mark.slow
def test_a_signal_while_workers_start_ends_the_run_and_is_not_lost_in_a_hook(tmp_path: Path) -> None:
    draw_folders(tmp_path / "images")
    process = subprocess.run(
        [sys.executable, "-c", SIGNAL_WHILE_WORKERS_START, *STREAMED, "dataset.workers=2"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert process.returncode == 143, process.stdout
    assert "Stopped. Resume with: " in process.stdout.strip().splitlines()[-1]
    assert "Traceback" not in process.stdout


def arguments_of(process: Path) -> list[bytes]:
    try:
        return (process / "cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return []


@pytest.mark.slow
def test_a_job_that_submitit_preempts_is_requeued_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    small = [part.replace("epochs=4", "epochs=40") for part in BARE]
    sweep = Program(tmp_path, "-m", "hydra/launcher=submitit_local", *small, "seed=0")
    wait_for(tmp_path, "multirun/*/*/last.pt", sweep)
    [job] = [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if b"submitit.core._submit" in arguments_of(process) and os.getpgid(int(process.name)) == sweep.pid
    ]
    os.kill(job, signal.SIGUSR2)
    output, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, output
    [log] = [path.read_text() for path in tmp_path.glob("multirun/*/.submitit/*/*_0_log.out")]
    assert "Requeued job" in log
    assert "resumes after epoch" in log
    [folder] = {path.parent for path in tmp_path.glob("multirun/*/*/last.pt")}
    assert [line["epoch"] for line in lines_of(folder)] == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_ends_a_run_properly_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    long = [part.replace("epochs=4", "epochs=10000") for part in SMALL]
    process = Program(tmp_path, *long)
    wait_for(tmp_path, "outputs/*/*/last.pt", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    expected = shlex.join(["okddip", *long, "trainer.resume=auto"])
    assert output.strip().splitlines()[-1] == f"Stopped. Resume with: {expected}"
    [last] = tmp_path.glob("outputs/*/*/last.pt")
    checkpoint.load(last)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("okddip").experiment_id])
    assert run.info.status == "KILLED"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "overrides"),
    [
        (4, ["method=okddip"]),
        (2, ["method=one", "trainer.limit_batches=2", "tracking=none"]),
    ],
)
def test_a_run_killed_many_times_at_random_moments_ends_as_if_never_killed(
    tmp_path: Path, kills: int, overrides: list[str]
) -> None:
    command = [*(part.replace("epochs=4", "epochs=60") for part in SMALL), *overrides]
    whole = Program(tmp_path, *command, "hydra.run.dir=whole/run")
    output, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, output

    moments = random.Random(0)
    killed = 0
    while killed < kills:
        process = Program(tmp_path, *command, "trainer.resume=auto")
        if killed % 2:  # while epochs pass and checkpoints are written; else anywhere, start-up included
            wait_for(tmp_path, "outputs/*/*/last.pt", process)
            lines = [path.stat().st_mtime_ns for path in tmp_path.glob("outputs/*/*/metrics.jsonl")]
            while process.poll() is None and lines == [
                path.stat().st_mtime_ns for path in tmp_path.glob("outputs/*/*/metrics.jsonl")
            ]:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.1))
        else:
            time.sleep(moments.uniform(0.1, 3))
        assert process.poll() is None, "finished before it could be killed: make the run longer"
        process.kill()
        process.communicate()
        killed += 1
    last = Program(tmp_path, *command, "trainer.resume=auto")
    output, _ = last.communicate(timeout=600)
    assert last.returncode == 0, output
    [folder] = {path.parent for path in tmp_path.glob("outputs/*/*/last.pt")}
    assert are_the_same(weights(tmp_path / "whole" / "run"), weights(folder))
    lines = [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 61))
    if "tracking=none" not in overrides:
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        run_id = json.loads((folder / "run.json").read_text())["tracking_id"]
        assert client.get_run(run_id).info.status == "FINISHED"
        logged = client.get_metric_history(run_id, "test/top1")
        assert sorted(metric.step for metric in logged) == list(range(1, 61))
