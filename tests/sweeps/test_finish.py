"""The end of a sweep: its report, its parent run, its last lines."""

import signal
import time
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf
from program import Program
from sweep_helpers import SMALL, Okddip, outcomes, runs


@pytest.mark.slow
def test_a_report_on_a_sweep_has_the_runs_that_another_finished(okddip: Okddip, tmp_path: Path) -> None:
    for name, seeds in (("first", "0,1"), ("second", "1,2")):
        answer = okddip("-m", *SMALL, "method=baseline", f"seed={seeds}", f"hydra.sweep.dir={name}")
        assert answer.code == 0, answer.err
    _, second = runs(tmp_path, "parents")
    answer = okddip("task=report", f"report.sweep={second.info.run_id}", "report.out=report")
    assert answer.code == 0, answer.err
    [table] = pd.read_csv(tmp_path / "report" / "table.csv").to_dict("records")
    assert table["seeds"] == "1 2"


@pytest.mark.slow
def test_whatever_fails_at_the_end_of_a_sweep_is_shown_and_its_parent_closed(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no more handles")

    monkeypatch.setattr("okddip.sweeps.finish.write_report", fail)
    answer = okddip("-m", *SMALL, "method=baseline", "seed=0")
    assert answer.code == 0
    assert "The sweep's runs could not be closed or reported on:" in answer.out + answer.err
    assert "no more handles" in answer.out + answer.err
    assert "1 job: 1 finished." in answer.out
    assert [run.info.status for run in runs(tmp_path, "parents")] == ["FINISHED"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "signals"),
    [
        ((), 1),
        (("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), 1),
        (("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), 20),
    ],
    ids=["basic", "joblib", "joblib-impatient"],
)
def test_a_signal_ends_a_sweep_with_its_jobs_and_closes_their_runs(
    tmp_path: Path, launcher: tuple[str, ...], signals: int
) -> None:
    if launcher:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    process = Program(tmp_path, *SMALL, *launcher, "seed=0,1", "trainer.epochs=10000", "hydra.mode=MULTIRUN")
    side_by_side = 2 if launcher else 1
    while len(list(tmp_path.glob("multirun/*/*/last.pt"))) < side_by_side:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.03)
    output, _ = process.communicate(timeout=60)  # ends when the last process that writes to it has
    assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM), output
    assert [f"cut off #{number}" in output for number in (0, 1)] == [True, bool(launcher)]
    statuses = [run.info.status for run in runs(tmp_path, "parents") + runs(tmp_path)]
    assert statuses == ["KILLED"] * (1 + side_by_side)


@pytest.mark.slow
def test_jobs_of_submitit_outlive_a_sweep_that_is_stopped_and_are_waited_for(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = (*SMALL, "method=baseline", "seed=0,1", "trainer.epochs=60", "hydra.mode=MULTIRUN")
    command += ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5")
    process = Program(tmp_path, *command)
    while len(list(tmp_path.glob("multirun/*/*/last.pt"))) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    lines = iter(process.stdout.readline, "")
    assert "Sweep seed, 2 jobs: 2 cut off.\n" in lines
    assert "Jobs that submitit was given may go on, or begin, without this process.\n" in lines
    assert process.wait(60) == 128 + signal.SIGTERM
    again = Program(tmp_path, *command)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert "Sweep seed, 2 jobs: 2 finished before." in output
    assert [run.info.status for run in runs(tmp_path, "parents") + runs(tmp_path)] == ["FINISHED"] * 3


LONG_UPLOAD = """
import time
from mlflow import MlflowClient
MlflowClient.log_artifacts = lambda *_: time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.parametrize("change", ["", LONG_UPLOAD], ids=["writing", "waiting"])
def test_a_signal_while_a_sweep_is_reported_on_ends_it_as_killed(tmp_path: Path, change: str) -> None:
    program = f"{change}\nfrom okddip.main import cli\ncli()"
    process = Program(tmp_path, "-m", *SMALL, "seed=0", code=program)
    while "Tables and figures" not in (line := process.stdout.readline()):
        assert line, "there was no report"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "1 job: 1 finished." in output
    assert [run.info.status for run in runs(tmp_path, "parents") + runs(tmp_path)] == ["KILLED", "FINISHED"]


@pytest.mark.slow
def test_optuna_maximizes_what_jobs_return_and_passes_over_those_that_fail(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    process = Program(
        tmp_path,
        *("-m", *SMALL[:-1], "trainer.epochs=2", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid"),
        *("hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"),
        *("optimizer.lr=choice(0.0001,0.05,1e30)", "hydra.sweep.dir=sweep", "method=baseline"),
        *("trainer.limit_batches=8", "dataset.validation=0.2"),
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output  # one failed
    assert sorted(kind for _, kind in outcomes(tmp_path / "sweep")) == ["failed", "finished", "finished"]
    best = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert best.best_params["optimizer.lr"] == 0.05
    # on the images held out of training: the test images choose nothing
    assert best.best_value == max(run.data.metrics.get("val/top1", 0) for run in runs(tmp_path))


@pytest.mark.slow
def test_what_ends_a_study_of_optuna_is_among_its_last_lines(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    process = Program(
        tmp_path,
        *("-m", *SMALL, "tracking=none", "hydra/sweeper=optuna", "hydra/sweeper/sampler=random"),
        *("hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=8", "hydra.sweeper.n_jobs=1"),
        *("method=choice(one,baseline)", "method.temperature=choice(2,3)"),
        "hydra.sweeper.sampler.seed=2",  # draws ONE first
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    assert "jobs: 3 finished." in output
    assert "The sweep itself ended early: method.temperature=" in output.splitlines()[-1], output
