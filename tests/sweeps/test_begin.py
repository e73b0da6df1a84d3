"""The beginning of a sweep, and what is refused there."""

from pathlib import Path

import pytest
from sweep_helpers import SMALL, Okddip


@pytest.mark.parametrize("mode", ["RUN", "MULTIRUN"])
def test_a_working_directory_for_each_job_is_refused_by_name(okddip: Okddip, mode: str) -> None:
    answer = okddip(*SMALL, "hydra.job.chdir=true", f"hydra.mode={mode}")
    assert answer.code == 1
    assert "hydra.job.chdir=true: would move" in answer.err
    assert "Traceback" not in answer.err


def test_several_presets_at_once_are_refused(okddip: Okddip) -> None:
    answer = okddip("-m", *SMALL, "tracking=none", "multirun_presets=quickstart,temperature")
    assert answer.code == 1
    assert "multirun_presets=quickstart,temperature: a preset is a sweep of its own" in answer.err
    assert "Traceback" not in answer.err


def test_a_sweep_over_numbers_of_threads_is_refused(okddip: Okddip) -> None:
    answer = okddip("-m", *SMALL, "tracking=none", "trainer.threads=1,2")
    assert answer.code == 1
    assert "trainer.threads=1,2: the number of threads makes no other run" in answer.err


def test_a_sweep_on_a_store_that_cannot_be_opened_runs_no_job(okddip: Okddip, tmp_path: Path) -> None:
    answer = okddip("-m", *SMALL, "seed=0,1", "tracking.uri=sqlite:///missing/mlflow.db")
    assert answer.code == 1
    assert "tracking.uri=sqlite:///missing/mlflow.db: this store cannot be opened" in answer.err
    assert not list(tmp_path.glob("multirun/*/[!.]*"))


def test_optuna_is_not_let_to_look_for_the_worst_accuracy(okddip: Okddip) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    answer = okddip("-m", *SMALL, "hydra/sweeper=optuna", "optimizer.lr=interval(0.01,0.3)", "tracking=none")
    assert answer.code == 1
    assert "hydra.sweeper.direction=minimize: " in answer.err
    assert "Add hydra.sweeper.direction=maximize." in answer.err
