"""What became of jobs, in files of their folders."""

from pathlib import Path

import pytest
from sweep_helpers import SMALL, Okddip, runs

from okddip.sweeps.outcomes import Outcome, read_outcomes, write_outcome


@pytest.mark.slow
def test_an_outcome_that_cannot_be_read_does_not_keep_a_sweep_from_its_end(
    okddip: Okddip, tmp_path: Path
) -> None:
    (tmp_path / "sweep" / "torn").mkdir(parents=True)
    (tmp_path / "sweep" / "torn" / "outcome-0.json").write_text('{"job": 1')
    answer = okddip("-m", *SMALL, "method=baseline", "seed=0", "hydra.sweep.dir=sweep")
    assert answer.code == 0, answer.err
    assert "1 job: 1 finished." in answer.out
    assert [run.info.status for run in runs(tmp_path, "parents")] == ["FINISHED"]


def test_a_job_that_outlives_its_sweep_does_not_write_over_what_became_of_the_next_sweeps(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "0-job"
    folder.mkdir()
    write_outcome(Outcome(0, [], "finished before", start="second"), folder)
    write_outcome(Outcome(0, [], "finished", start="first"), folder)
    assert [outcome.kind for outcome in read_outcomes(tmp_path, "second")] == ["finished before"]
    assert [outcome.kind for outcome in read_outcomes(tmp_path, "first")] == ["finished"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["hydra.output_subdir=null", "hydra.sweep.subdir=deep/${hydra.job.num}"])
def test_outcomes_are_those_of_this_sweep_wherever_hydra_puts_its_jobs(
    okddip: Okddip, tmp_path: Path, layout: str
) -> None:
    command = (*SMALL, "tracking=none", "hydra.mode=MULTIRUN", "hydra.sweep.dir=out", layout)
    answer = okddip(*command, "method=baseline", "seed=0,-1")
    assert answer.code == 1
    assert "2 jobs: 1 finished, 1 failed" in answer.out
    answer = okddip(*command, "method=independent", "seed=0", "name=other", "hydra.sweep.subdir=other")
    assert answer.code == 0, answer.err
    assert "1 job: 1 finished." in answer.out
