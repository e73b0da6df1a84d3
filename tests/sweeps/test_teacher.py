"""Teachers that are found, trained first or waited for."""

import os
import shutil
import signal
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from program import Program
from sweep_helpers import SMALL, Okddip, outcomes, runs

from okddip.api import runs as rows


@pytest.mark.slow
def test_a_teacher_is_trained_once_as_a_run_of_its_own(okddip: Okddip, tmp_path: Path) -> None:
    common = (*SMALL, "methods.teacher=auto", "methods.teacher_model=resnet14")
    assert okddip("-m", *common, "method=kd", "method.temperature=2,3", "hydra.sweep.dir=kd").code == 0
    [teacher] = runs(tmp_path, "others")
    assert teacher.info.run_name == "teacher baseline1-seed0-network-resnet14-digits"
    assert teacher.info.status == "FINISHED"
    [sweep] = runs(tmp_path, "parents")
    assert teacher.data.tags["mlflow.parentRunId"] == sweep.info.run_id  # and none of its jobs:
    assert "baseline" not in (tmp_path / "kd" / "report" / "table.txt").read_text()
    assert [run.data.params["method.teacher"] for run in runs(tmp_path)] == ["auto", "auto"]
    [kind] = {run.data.tags["teacher"] for run in runs(tmp_path)}
    assert kind.startswith("resnet14-")
    marked = rows(uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert list(marked["method"][marked["teacher"]]) == ["baseline"]
    assert list(marked["method"][~marked["teacher"]]) == ["kd", "kd"]

    # a job that is this very baseline is finished with it
    answer = okddip("-m", *common, "method=baseline", "model=resnet14,resnet8", "hydra.sweep.dir=baselines")
    assert answer.code == 0, answer.err
    assert outcomes(tmp_path / "baselines") == [(0, "finished before"), (1, "finished")]
    sweeps = runs(tmp_path, "parents")
    for sweep in (sweeps[-1].info.run_id, None):  # and no teacher that a mean has to leave out
        for where in ("params.method = 'baseline'", None):
            marked = rows(sweep, where, uri=f"sqlite:///{tmp_path}/mlflow.db")
            assert not marked["teacher"].any()

    # another seed has another teacher
    assert okddip(*common, "method=kd", "seed=1").code == 0
    others = runs(tmp_path, "others")
    assert sorted(run.data.tags["seed"] for run in others) == ["0", "1", "1"]
    assert [run.data.tags["teacher"] for run in others if "teacher" in run.data.tags] == [kind]
    marked = rows(uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert list(marked["seed"][marked["teacher"]]) == [
        1
    ]  # outside sweeps too; that of seed 0 is a job by now


@pytest.mark.slow
def test_a_student_has_several_teachers(okddip: Okddip, tmp_path: Path) -> None:
    common = (*SMALL, "method=kd", "methods.teacher_model=resnet14")
    for seed, seeds in ((0, "0 & 1"), (1, "1 & 2")):
        answer = okddip(*common, "methods.teacher=[auto,auto]", f"seed={seed}")
        assert answer.code == 0, answer.err
        students = [run for run in runs(tmp_path, "others") if run.data.tags["method"] == "kd"]
        assert students[-1].data.tags["teacher.seed"] == seeds
    teachers = [run.data.tags["seed"] for run in runs(tmp_path, "others") if run.data.tags["method"] != "kd"]
    assert teachers == ["0", "1", "2"]  # the one that both have is trained once

    folders = [run.data.tags["folder"] for run in runs(tmp_path, "others")[:2]]
    answer = okddip(*common, "tracking=none", f"method.teacher=[{','.join(folders)}]", "hydra.run.dir=named")
    assert answer.code == 0, answer.err
    assert "teacher1 " in answer.out
    answer = okddip("task=evaluate", "checkpoint=named", "tracking=none")
    assert answer.code == 0, answer.err


@pytest.mark.slow
def test_a_teacher_of_edited_code_is_trained_anew(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    code = tmp_path / "own_optimizer.py"
    code.write_text("from torch.optim import SGD\n\n\nclass Own(SGD):\n    pass\n")
    student = (*SMALL, "method=kd", "method.teacher=auto", "method.teacher_model=resnet14")
    student += ("optimizer._target_=own_optimizer.Own",)
    for _ in range(2):
        answer = okddip(*student)
        sys.modules.pop("own_optimizer")
        assert answer.code == 0, answer.err
        assert "trained first" in answer.out
        code.write_text(code.read_text() + "# edited\n")
    teachers = [run for run in runs(tmp_path, "others") if run.data.tags["method"] == "baseline"]
    assert len({run.data.tags["code"] for run in teachers}) == len(teachers) == 2


def test_a_teacher_that_cannot_be_is_refused(okddip: Okddip) -> None:
    answer = okddip(*SMALL, "tracking=none", "method=kd", "method.teacher=auto")
    assert answer.code == 1
    assert "method.teacher=auto: takes method.teacher_model" in answer.err
    answer = okddip(
        *SMALL, "tracking=none", "method=kd", "method.teacher=auto", "method.teacher_model=alexnet"
    )
    assert answer.code == 1
    assert "method.teacher_model=alexnet: " in answer.err
    assert "resnet110" in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.slow
def test_a_teacher_is_found_in_whatever_experiment_it_was_trained(okddip: Okddip, tmp_path: Path) -> None:
    plain = okddip(*SMALL, "method=baseline", "tracking.experiment=baselines", "hydra.run.dir=plain")
    assert plain.code == 0, plain.err
    answer = okddip(*SMALL, "method=kd", "method.teacher=auto", "method.teacher_model=resnet8")
    assert answer.code == 0, answer.err
    assert "teacher    baseline1-seed0-network-resnet8-digits, finished as MLflow run" in answer.out
    [student] = runs(tmp_path, "others")  # of this experiment
    assert student.data.tags["method"] == "kd"

    # one that has no checkpoint any more is none
    shutil.rmtree(tmp_path / "plain")
    shutil.rmtree(tmp_path / "mlartifacts")
    answer = okddip(*SMALL, "method=kd", "method.teacher=auto", "method.teacher_model=resnet8", "seed=0")
    assert answer.code == 0, answer.err
    assert "cannot be used: " in answer.out
    assert "teacher    baseline1-seed0-network-resnet8-digits, trained first" in answer.out


def is_locked(database: Path) -> bool:
    with closing(sqlite3.connect(database, timeout=0)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("tracking", ["tracking=mlflow", "tracking=none"])
def test_a_teacher_is_waited_for_where_a_plain_run_trains_it(tmp_path: Path, tracking: str) -> None:
    common = (*SMALL, "trainer.epochs=9", tracking)
    place = {"tracking=none": "outputs/baseline1-seed0-network-resnet8-digits/plain"}.get(
        tracking, "else/where"
    )
    plain = Program(tmp_path, *common, "method=baseline", f"hydra.run.dir={place}")
    while not (tmp_path / place / "last.pt").exists():
        assert plain.poll() is None, plain.communicate()[0]
        time.sleep(0.01)
    os.killpg(plain.pid, signal.SIGSTOP)
    while tracking == "tracking=mlflow" and is_locked(tmp_path / "mlflow.db"):  # it was just writing
        os.killpg(plain.pid, signal.SIGCONT)
        time.sleep(0.05)
        os.killpg(plain.pid, signal.SIGSTOP)
    teacher = ("method=kd", "method.teacher=auto", "method.teacher_model=resnet8")
    student = Program(tmp_path, *common, *teacher, "hydra.run.dir=student")
    said = ""
    while "another process" not in said:
        line = student.stdout.readline()
        assert line, f"it did not wait: {said}"
        said += line
    os.killpg(plain.pid, signal.SIGCONT)
    output, _ = plain.communicate(timeout=300)
    assert plain.returncode == 0, output
    output, _ = student.communicate(timeout=300)
    assert student.returncode == 0, output
    assert "is finished after epoch 9, so nothing is trained" in output
    if tracking == "tracking=mlflow":
        assert [run.info.status for run in runs(tmp_path, "others")] == ["FINISHED"] * 2


@pytest.mark.slow
def test_a_teacher_whose_process_ends_with_its_sweep_is_not_called_running(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    teacher = ("method=kd", "method.teacher=auto", "method.teacher_model=resnet14")
    process = Program(
        tmp_path, "-m", *SMALL, *teacher, "seed=0", "trainer.epochs=10000", "hydra/launcher=joblib"
    )
    while not list(tmp_path.glob("outputs/baseline1*/*/last.pt")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert [run.info.status for run in runs(tmp_path, "parents") + runs(tmp_path, "others")] == ["KILLED"] * 2
