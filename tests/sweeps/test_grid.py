"""Grids: what is skipped, and what a killed process costs."""

from pathlib import Path

import pytest
from program import REPOSITORY, Program
from sweep_helpers import SMALL, Okddip, outcomes, runs

from okddip.sweeps.grid import once_without_peers


def test_a_sweep_without_a_sensible_job_fails(okddip: Okddip) -> None:
    answer = okddip("-m", *SMALL, "tracking=none", "method=one", "method.structure=network", "seed=0,1")
    assert answer.code == 1
    assert "2 jobs: 2 skipped" in answer.out


def test_a_setting_that_only_some_methods_have_is_swept_with_those(okddip: Okddip, tmp_path: Path) -> None:
    command = ("-m", *SMALL, "method=baseline,one", "tracking=none", "hydra.sweep.dir=sweep")
    answer = okddip(*command, "method.temperature=2,3")
    assert answer.code == 0, answer.err
    assert outcomes(tmp_path / "sweep") == [(0, "finished"), (1, "finished")]
    *_, summary, first, second = answer.out.splitlines()
    assert summary.endswith("4 jobs: 2 finished, 2 skipped.")
    assert first == (
        "skipped #2 method=baseline method.temperature=2: method.temperature: is not a setting of the"
        " chosen options."
    )
    assert second.startswith("skipped #3 method=baseline method.temperature=3: ")

    mistyped = okddip(*command, "method.temprature=2,3", "tracking=mlflow")
    assert mistyped.code == 1
    assert "Did you mean method.temperature=2?" in mistyped.err
    assert "no jobs." in mistyped.out
    assert not (tmp_path / "mlflow.db").exists()  # nor a parent run in it


def test_a_method_of_one_student_runs_once_beside_numbers_of_peers() -> None:
    def jobs(*methods: str) -> list[list[str]]:
        combinations = [
            [f"method={method}", f"method.peers={peers}", f"seed={seed}"]
            for method in methods
            for peers in (3, 4)
            for seed in (0, 1)
        ]
        return once_without_peers(combinations, "method=baseline".__eq__)

    found = jobs("baseline", "okddip")
    assert found[:2] == [["method=baseline", "seed=0"], ["method=baseline", "seed=1"]]
    assert len(found) == 2 + 4
    assert all("method.peers=" in job[1] for job in found[2:])
    assert len(jobs("baseline")) == 4  # alone it is refused, each time


@pytest.mark.slow
def test_the_baseline_is_trained_once_where_peers_are_swept(okddip: Okddip, tmp_path: Path) -> None:
    answer = okddip(
        *("-m", *SMALL, "tracking=none", "hydra.sweep.dir=sweep"),
        *("method=baseline,independent", "method.peers=2,3"),
    )
    assert answer.code == 0, answer.err
    assert "method=baseline: one student, so one run for all values of method.peers." in answer.out
    assert "3 jobs: 3 finished." in answer.out


@pytest.mark.slow
def test_an_ablation_is_passed_over_where_the_method_has_no_such_switch(
    okddip: Okddip, tmp_path: Path
) -> None:
    command = ("-m", *SMALL, "method=okddip,kd", "methods.teacher=auto", "methods.teacher_model=resnet8")
    answer = okddip(*command, "ablation=full,no_leader")
    assert answer.code == 0, answer.err
    assert "4 jobs: 3 finished, 1 skipped." in answer.out
    assert (
        "skipped #3 method=kd ablation=no_leader: ablation=no_leader: sets method.leader, which" in answer.out
    )


MORTAL = """
import os
import signal
from okddip.training.trainer import Trainer


class Mortal(Trainer):
    def fit(self, **parts):
        if parts["seed"] == 1:  # as if its memory ran out, each time
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fit(**parts)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "warning"),
    [
        (("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), "A process of joblib was killed"),
        (("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"), "has no result; see "),
    ],
    ids=["joblib", "submitit"],
)
def test_a_killed_process_takes_no_other_job_with_it(
    tmp_path: Path, launcher: tuple[str, ...], warning: str
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "mortal.py").write_text(MORTAL)
    command = [*SMALL, "method=baseline", "seed=0,1,2,3,4", "trainer._target_=mortal.Mortal", *launcher]
    process = Program(
        tmp_path, "-m", *command, "hydra.sweep.dir=sweep", PYTHONPATH=f"{REPOSITORY}:{tmp_path}"
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    kinds = ["finished", "cut off", "finished", "finished", "finished"]
    assert outcomes(tmp_path / "sweep") == list(enumerate(kinds))
    assert warning in output
    assert "5 jobs: 4 finished, 1 cut off." in output
    assert "cut off #1 seed=1: its process did not finish" in output
    assert "Traceback" not in output
    statuses = {run.data.tags["seed"]: run.info.status for run in runs(tmp_path)}
    assert statuses == {seed: "KILLED" if seed == "1" else "FINISHED" for seed in "01234"}
    [parent] = runs(tmp_path, "parents")
    assert parent.info.status == "FAILED"
