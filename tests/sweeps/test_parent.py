"""The parent run of a sweep, and which sweeps are the same."""

import os
import signal
import time
from pathlib import Path

import mlflow
import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from program import Program
from sweep_helpers import SMALL, Okddip, runs

from okddip.assembly import CONFIG_HOME
from okddip.sweeps.parent import keys_in_name, parent_tags, sweep_identity, sweep_overrides


@pytest.mark.slow
def test_sweeps_with_other_shared_settings_are_other_sweeps(okddip: Okddip, tmp_path: Path) -> None:
    for epochs in (1, 2):
        answer = okddip("-m", *SMALL, "method=one", "seed=0,1", f"methods.ramp_epochs={epochs}")
        assert answer.code == 0, answer.err
        time.sleep(1)  # the sweep's folder is named by the second
    assert len(runs(tmp_path, "parents")) == 2


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ("dataset=image_folder,digits", True),
        ("dataset='image_folder',digits", True),
        ("dataset=choice(image_folder)", True),
        ("dataset=imagenet", True),
        ("dataset=cifar10,digits", False),
        ("seed=0,1", False),
    ],
)
def test_where_a_data_set_is_whatever_lies_in_its_folder_that_is_part_of_a_sweeps_identity(
    given: str, counts: bool
) -> None:
    with initialize_config_dir(str(CONFIG_HOME / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        first, second = (
            sweep_identity(
                "sweep", loader.load_configuration("config", [given, root], run_mode=RunMode.MULTIRUN)
            )
            for root in ("dataset.root=first", "dataset.root=second")
        )
    assert (first != second) is counts


@pytest.mark.parametrize(
    ("given", "model"),
    [
        ("model.peers=[resnet8,resnet8,resnet20]", "2xresnet8+resnet20"),
        ("model.peers=[resnet8,resnet20],[resnet8,resnet14]", "[resnet8,resnet20],[resnet8,resnet14]"),
        ("seed=0,1", "resnet32"),
    ],
)
def test_a_sweep_over_networks_of_peers_is_called_by_them(given: str, model: str) -> None:
    with initialize_config_dir(str(CONFIG_HOME / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", [given], run_mode=RunMode.MULTIRUN)
        assert parent_tags(config, sweep_overrides(config)[1])["model"] == model
    assert "model.peers" in keys_in_name(config)  # else the runs' names would have them twice


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [*SMALL, "method=baseline", "seed=0,1,2", "trainer.epochs=20", "hydra.mode=MULTIRUN"]
    killed = Program(tmp_path, *command)
    while not list(tmp_path.glob("multirun/*/1-*/previous.pt")):  # in the middle of the second job
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert [run.info.status for run in runs(tmp_path)] == ["FINISHED", "RUNNING"]

    again = Program(tmp_path, *command)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert "3 jobs: 1 finished before, 2 finished." in output
    assert output.count("; resumes after epoch") == 1
    [parent] = runs(tmp_path, "parents")
    assert parent.info.status == "FINISHED"
    assert [run.info.status for run in runs(tmp_path)] == ["FINISHED"] * 3
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    for run in runs(tmp_path):
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        logged = client.get_metric_history(run.info.run_id, "test/top1")
        assert sorted(metric.step for metric in logged) == list(range(1, 21))


@pytest.mark.slow
def test_a_forced_sweep_that_was_killed_goes_on_and_counts_nothing_from_before(tmp_path: Path) -> None:
    command = [*SMALL, "method=baseline", "seed=0,1,2", "trainer.epochs=20", "hydra.mode=MULTIRUN"]
    output, _ = Program(tmp_path, *command).communicate(timeout=300)
    assert "3 jobs: 3 finished." in output
    [before] = runs(tmp_path, "parents")
    killed = Program(tmp_path, *command, "trainer.rerun=true", "hydra.sweep.dir=multirun/forced")
    while not list(tmp_path.glob("multirun/forced/1-*/previous.pt")):
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    again = Program(tmp_path, *command, "trainer.rerun=true")
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert "3 jobs: 1 finished before, 2 finished." in output
    assert output.count("; resumes after epoch") == 1
    _, forced = runs(tmp_path, "parents")
    for parent in (before, forced):
        own = [run for run in runs(tmp_path) if run.data.tags["mlflow.parentRunId"] == parent.info.run_id]
        assert [run.info.status for run in own] == ["FINISHED"] * 3
    output, _ = Program(tmp_path, *command, "trainer.rerun=true").communicate(timeout=300)
    assert "3 jobs: 3 finished." in output  # the one before is finished: all is forced anew


@pytest.mark.slow
def test_what_a_killed_sweep_leaves_running_is_closed_by_the_next_sweep_whichever_it_is(
    tmp_path: Path,
) -> None:
    command = [*SMALL, "method=baseline", "seed=0,1", "trainer.epochs=1000", "hydra.mode=MULTIRUN"]
    killed = Program(tmp_path, *command)
    while not list(tmp_path.glob("multirun/*/0-*/previous.pt")):
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.01)
    going_on = Program(tmp_path, "-m", *SMALL, "method=baseline", "seed=7,8")
    output, _ = going_on.communicate(timeout=300)
    assert "2 jobs: 2 finished." in output
    assert [run.info.status for run in runs(tmp_path, "parents")] == ["RUNNING", "FINISHED"]
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    # of another machine, which may have a folder of this name too
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [own, _] = runs(tmp_path, "parents")
    theirs = client.create_run(
        own.info.experiment_id, tags={**own.data.tags, "host": "elsewhere"}
    ).info.run_id
    output, _ = Program(tmp_path, "-m", *SMALL, "method=baseline", "seed=9").communicate(timeout=300)
    assert "1 job: 1 finished." in output
    statuses = {run.info.run_id: run.info.status for run in runs(tmp_path, "parents")}
    assert statuses.pop(theirs) == "RUNNING"
    assert list(statuses.values()) == ["KILLED", "FINISHED", "FINISHED"]
    assert runs(tmp_path)[0].info.status == "KILLED"
