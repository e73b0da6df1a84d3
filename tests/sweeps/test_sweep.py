"""The sweep of a process, and its lock."""

import os
import signal
import time
from pathlib import Path

import pytest
from program import Program
from sweep_helpers import SMALL, Okddip


@pytest.mark.slow
def test_a_second_sweep_in_the_folder_of_one_that_goes_on_is_refused(okddip: Okddip, tmp_path: Path) -> None:
    common = ("-m", *SMALL, "method=baseline", "hydra.sweep.dir=sweep")
    first = Program(tmp_path, *common, "seed=0,1", "trainer.epochs=1000")
    try:
        while not list(tmp_path.glob("sweep/0-*/outcome-*.json")):
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.01)
        [configuration] = tmp_path.glob("sweep/0-*/.hydra/config.yaml")
        before = configuration.read_text()
        answer = okddip(*common, "seed=0,1", "optimizer.lr=0.01")
        assert answer.code == 1
        assert f"hydra.sweep.dir={tmp_path}/sweep: another sweep is running in this folder" in answer.err
        assert "Name another folder, or leave hydra.sweep.dir out" in answer.err
        assert configuration.read_text() == before
        answer = okddip(
            *common, "seed=0,1", "task=evaluate", "checkpoint=x"
        )  # one without a parent run neither
        assert "another sweep is running in this folder" in answer.err
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    answer = okddip(*common, "seed=7,8")
    assert answer.code == 0, answer.err
    assert "2 jobs: 2 finished." in answer.out


def test_a_sweep_whose_folder_takes_no_lock_is_refused(okddip: Okddip, tmp_path: Path) -> None:
    (tmp_path / "sweep" / ".sweep.lock").mkdir(parents=True)
    answer = okddip("-m", *SMALL, "method=baseline", "hydra.sweep.dir=sweep", "seed=0")
    assert answer.code == 1
    assert f"hydra.sweep.dir={tmp_path}/sweep: a file there cannot be locked (" in answer.err
    assert "Traceback" not in answer.out + answer.err
