"""Which runs are the same, wherever they were begun and finished."""

import os
import re
import shutil
import sys
from pathlib import Path

import mlflow
import pytest
from conftest import folders_of_images
from program import REPOSITORY
from sweep_helpers import SMALL, Okddip, outcomes, runs


@pytest.mark.slow
def test_a_run_on_other_images_is_another_run(okddip: Okddip, tmp_path: Path) -> None:
    for seed, root in enumerate(("first", "second")):
        folders_of_images(tmp_path / root, "cat", "dog", seed=seed)
    shutil.copytree("first", "moved")
    common = ("dataset=image_folder", "model=resnet8", "trainer.batch_size=8", "trainer.epochs=1")
    common += ("methods.teacher=auto", "methods.teacher_model=resnet14")

    def sweep(root: str, place: str) -> list[str]:
        answer = okddip(
            *("-m", *common, "method=kd", "seed=0", f"dataset.root={root}"),
            f"hydra.sweep.dir=sweeps/{place}",
        )
        assert answer.code == 0, answer.err
        return [kind for _, kind in outcomes(tmp_path / "sweeps" / place)]

    assert sweep("first", "0") == ["finished"]
    assert sweep("second", "1") == ["finished"]
    assert sweep("moved", "2") == ["finished before"]
    assert len(runs(tmp_path, "parents")) == 3
    assert [run.data.params["dataset.root"] for run in runs(tmp_path)] == ["first", "second"]
    teachers = runs(tmp_path, "others")
    assert [run.data.params["dataset.root"] for run in teachers] == ["first", "second"]
    assert len({run.data.tags["identity"] for run in teachers}) == 1


@pytest.mark.slow
def test_a_whole_number_is_the_same_setting_however_it_is_written(okddip: Okddip, tmp_path: Path) -> None:
    common = ("-m", *SMALL, "method=okddip", "seed=0")
    for place, temperature in (("first", "3"), ("second", "3.0")):
        answer = okddip(*common, f"method.temperature={temperature}", f"hydra.sweep.dir={place}")
        assert answer.code == 0, answer.err
    assert outcomes(tmp_path / "second") == [(0, "finished before")]


@pytest.mark.slow
def test_runs_of_another_experiment_and_deleted_ones_are_left_as_they_are(
    okddip: Okddip, tmp_path: Path
) -> None:
    command = ("-m", *SMALL, "method=baseline", "seed=0,1")
    assert okddip(*command).code == 0
    [parent], before = runs(tmp_path, "parents"), runs(tmp_path)
    answer = okddip(*command, "tracking.experiment=other")
    assert answer.code == 0, answer.err
    assert "in tracking.experiment=other of" in answer.out
    assert "2 jobs: 2 finished." in answer.out
    assert re.search(r"baseline +student +2 ", answer.out)  # the table has both
    assert [run.info.run_id for run in runs(tmp_path)] == [run.info.run_id for run in before]
    assert {run.data.tags["mlflow.parentRunId"] for run in runs(tmp_path)} == {parent.info.run_id}

    mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").delete_run(before[0].info.run_id)
    answer = okddip(*command)
    assert answer.code == 0, answer.err
    assert "2 jobs: 1 finished, 1 finished before." in answer.out
    assert [run.info.status for run in runs(tmp_path)] == ["FINISHED"] * 2

    # one that was cut off here and finished there is finished here too, as the run that it was
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.set_terminated(before[1].info.run_id, "KILLED")
    known = {run.info.run_id for run in runs(tmp_path)}
    answer = okddip(*command)
    assert answer.code == 0, answer.err
    assert {run.info.run_id for run in runs(tmp_path)} == known
    assert [run.info.status for run in runs(tmp_path)] == ["FINISHED"] * 2


@pytest.mark.slow
def test_another_store_is_told_of_runs_that_are_finished(okddip: Okddip, tmp_path: Path) -> None:
    command = ("-m", *SMALL, "method=baseline", "seed=0,1", "trainer.epochs=2")
    assert okddip(*command).code == 0
    [*first] = runs(tmp_path)
    (tmp_path / "else").mkdir()
    answer = okddip(*command, "tracking.uri=sqlite:///else/mlflow.db")
    assert answer.code == 0, answer.err
    assert answer.out.count("/else/mlflow.db: a new run gets all epochs.") == 2
    assert answer.out.count("is finished after epoch 2, so nothing is trained") == 2
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/else/mlflow.db")
    for run, before in zip(runs(tmp_path / "else"), first, strict=True):
        assert run.data.metrics["final/top1"] == before.data.metrics["final/top1"]
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, "test/top1")] == [1, 2]
    for uri in ("sqlite:///mlflow.db", "sqlite:///else/mlflow.db"):
        assert "2 jobs: 2 finished before." in okddip(*command, f"tracking.uri={uri}").out

    shutil.move("mlflow.db", "moved.db")  # a store that is the same, in another place
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/moved.db")
    client.set_terminated(first[0].info.run_id, "KILLED")
    answer = okddip(*command, "tracking.uri=sqlite:///moved.db")
    assert "2 jobs: 1 finished, 1 finished before." in answer.out
    assert client.get_run(first[0].info.run_id).info.status == "FINISHED"


@pytest.mark.skipif(not Path("/sys/kernel").exists(), reason="needs a folder that root cannot write")
def test_a_cache_that_takes_no_locks_is_named(okddip: Okddip, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"locks-{os.getuid()}").symlink_to("/sys/kernel")
    answer = okddip("-m", *SMALL, "seed=0")
    assert answer.code != 0
    said = answer.out + answer.err
    assert f"dataset.cache_dir={tmp_path}/cache: cannot be written (" in said
    assert "Name another folder, here or in OKDDIP_CACHE." in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_run_of_edited_code_of_ones_own_is_another_run(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    code = tmp_path / "own_method.py"
    code.write_text(
        "from okddip.methods.independent import Independent\n\n\nclass Own(Independent):\n    pass\n"
    )
    option = tmp_path / "options" / "method" / "own.yaml"
    option.parent.mkdir(parents=True)
    plain = (REPOSITORY / "conf" / "method" / "independent.yaml").read_text()
    option.write_text(re.sub("_target_: .*", "_target_: own_method.Own", plain))
    common = ("--config-dir", "options", *SMALL, "method=own")

    def sweep(place: str) -> tuple[list[tuple[int, str]], str]:
        answer = okddip("-m", *common, "seed=0", f"hydra.sweep.dir={place}")
        assert answer.code == 0, answer.err
        return outcomes(tmp_path / place), answer.out

    assert sweep("first")[0] == [(0, "finished")]
    assert sweep("same")[0] == [(0, "finished before")]
    code.write_text(code.read_text().replace("pass", "edited = True"))
    assert sweep("loaded")[0] == [(0, "finished before")]  # this process still has the code before
    sys.modules.pop("own_method")
    kinds, said = sweep("edited")
    assert kinds == [(0, "finished")]
    assert "has the same settings, but your own code was another." in said
    assert sweep("again")[0] == [(0, "finished before")]

    # what is resumed goes on, and says so
    code.write_text(code.read_text().replace("edited", "edited_again"))
    sys.modules.pop("own_method")
    [folder] = (tmp_path / "edited").glob("0-*")
    answer = okddip(*common, "seed=0", f"trainer.resume={folder}", "trainer.epochs=2")
    assert answer.code == 0, answer.err
    assert "your own code has changed; the epochs until now are of the code before" in answer.out + answer.err
    answer = okddip("-m", *common, "seed=0", "trainer.epochs=2", "hydra.sweep.dir=longer")
    assert outcomes(tmp_path / "longer") == [(0, "finished")]  # and no run of the code that there is now
    sys.modules.pop("own_method")
