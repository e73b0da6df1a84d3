"""Sweeps: jobs under one parent, what becomes of them, and going on with them."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from conftest import Answer, folders_of_images
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from mlflow.entities import Run
from omegaconf import DictConfig, OmegaConf

from okddip.assembly import CONFIG_HOME
from okddip.errors import ConfigError
from okddip.sweeps.joblib import choose_gpu
from okddip.sweeps.outcomes import Outcome, read_outcomes, write_outcome
from okddip.sweeps.parent import datasets
from okddip.training import checkpoint
from okddip.training.devices import find_device
from okddip.training.trainer import Trainer

Okddip = Callable[..., Answer]
REPOSITORY = Path(__file__).parents[2]
SMALL = (
    "dataset=digits",
    "model=resnet8",
    "trainer.epochs=1",
    "trainer.limit_batches=1",
    "optimizer.lr=0.02",
)
PRESETS = sorted(path.stem for path in (CONFIG_HOME / "multirun_presets").glob("*.yaml"))
JOBS = {
    "quickstart": 7 * 2,
    "methods": 7 * 3,
    "peer_counts": 6 * 3,
    "ablations": 11 * 3,
    "temperature": 6 * 3,
    "paper_cifar10": 5 * 7 * 3,
    "paper_cifar100": 5 * 7 * 3,
    "cifar10_5k": 7 * 3,
}
ABLATIONS = sorted(path.stem for path in (CONFIG_HOME / "conf" / "ablation").glob("*.yaml"))


def runs(folder: Path, kind: str = "jobs") -> list[Run]:
    """Runs of the store in a folder, oldest first: the jobs of sweeps, their parents, or others."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("okddip")
    assert experiment is not None
    found = {
        "parents": lambda tags: tags.get("kind") == "sweep",
        "jobs": lambda tags: "mlflow.parentRunId" in tags,
        "others": lambda tags: "kind" not in tags and "mlflow.parentRunId" not in tags,
    }[kind]
    stored = client.search_runs([experiment.experiment_id])
    return sorted((run for run in stored if found(run.data.tags)), key=lambda run: run.info.start_time)


def outcomes(folder: Path) -> list[tuple[int, str]]:
    read = [json.loads(path.read_text()) for path in folder.glob("*/outcome-*.json")]
    return sorted((outcome["job"], outcome["kind"]) for outcome in read)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "last.pt")["group"]


def are_the_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def jobs_of(preset: str, *overrides: str) -> list[list[str]]:
    """The jobs of a preset with overrides, split as Hydra does it."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_HOME / "conf"), version_base="1.3"):
        config = compose("config", [f"multirun_presets={preset}"], return_hydra_config=True)
    assert config.hydra.mode.name == "MULTIRUN"
    lines = [f"{key}={value}" for key, value in config.hydra.sweeper.params.items()]
    parsed = OverridesParser.create().parse_overrides([*lines, *overrides])
    return BasicSweeper.split_arguments(parsed, None)[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_whole_sweep_whose_jobs_have_names_of_their_own(
    configured: Callable[..., DictConfig], preset: str
) -> None:
    split = jobs_of(preset)
    assert len(split) == JOBS[preset]
    names = set()
    for job in split[:21]:
        config = configured(f"multirun_presets={preset}", *job)
        names.add(config.name)
        if config.options.method == "kd":
            assert config.method.teacher == "auto"
    assert len(names) == min(len(split), 21)


def test_what_the_command_line_says_replaces_what_a_preset_says() -> None:
    jobs = jobs_of("methods", "seed=7", "method=okddip,one", "model=resnet20")
    assert sorted(jobs) == [
        ["method=okddip", "seed=7", "model=resnet20"],
        ["method=one", "seed=7", "model=resnet20"],
    ]


@pytest.mark.parametrize("option", [option for option in ABLATIONS if option != "full"])
def test_an_ablation_changes_one_setting_of_okddip(
    configured: Callable[..., DictConfig], option: str
) -> None:
    def method(*overrides: str) -> dict[str, Any]:
        resolved = OmegaConf.to_container(configured(*overrides).method, resolve=True)
        assert isinstance(resolved, dict)
        return {str(key): value for key, value in resolved.items()}

    full, ablated = method("ablation=full"), method(f"ablation={option}")
    assert full == method()
    assert len([key for key in full if full[key] != ablated[key]]) == 1
    assert full.keys() == ablated.keys()


def test_help_shows_groups_once_and_sweeps_with_a_line_each(okddip: Okddip) -> None:
    answer = okddip("--help", "method=one", "seed=5")
    assert answer.code == 0
    assert "  tracking   mlflow none" in answer.out
    assert "  quickstart      All methods, two seeds" in answer.out
    assert "conf/" not in answer.out
    assert "seed: 5" in answer.out
    for preset in PRESETS:
        [line] = [line for line in answer.out.splitlines() if line.startswith(f"  {preset} ")]
        assert len(line) <= 120


def test_a_sweep_runs_all_jobs_and_says_what_became_of_them(okddip: Okddip, tmp_path: Path) -> None:
    command = ("-m", *SMALL, "method.peers=2,3", "optimizer.lr=1e30,0.02", "trainer.epochs=2")
    answer = okddip(*command, "hydra.sweep.dir=sweep")
    assert answer.code == 1, answer.err
    kinds = ["skipped", "failed", "skipped", "finished"]
    assert outcomes(tmp_path / "sweep") == list(enumerate(kinds))
    *_, summary, first, second, failed, hint = answer.out.splitlines()
    assert summary == "Sweep method.peers x optimizer.lr, 4 jobs: 2 skipped, 1 failed, 1 finished."
    assert first.startswith("skipped #0 optimizer.lr=1e+30 method.peers=2: method.peers=2: OKDDip takes at")
    assert second.startswith("skipped #2 optimizer.lr=0.02 method.peers=2: ")
    assert failed.startswith("failed #1 optimizer.lr=1e+30 method.peers=3: Epoch ")
    assert "The same command again" in hint

    [parent] = runs(tmp_path, "parents")
    assert parent.info.status == "FAILED"
    assert parent.info.run_name == "method.peers x optimizer.lr"
    assert parent.data.params["sweep.method.peers"] == "2,3"
    assert parent.data.tags.items() >= {
        *(("method", "okddip"), ("model", "resnet8"), ("dataset", "digits"), ("structure", "branch")),
        *(("peers", "2,3"), ("seed", "0"), ("sweep", "method.peers x optimizer.lr")),
    }
    assert [run.info.status for run in runs(tmp_path)] == ["FAILED", "FINISHED"]
    names = [f"lr={lr} okddip3-seed0-branch-resnet8-digits" for lr in ("1e+30", "0.02")]
    assert [run.info.run_name for run in runs(tmp_path)] == names
    for run in runs(tmp_path):
        assert run.data.tags.items() >= {
            *(("method", "okddip"), ("model", "resnet8"), ("dataset", "digits"), ("structure", "branch")),
            *(("peers", "3"), ("seed", "0"), ("sweep", "method.peers x optimizer.lr")),
            ("mlflow.parentRunId", parent.info.run_id),
        }
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert [file.path for file in client.list_artifacts(parent.info.run_id) if file.is_dir] == ["report"]

    # again, in another place: what is finished is left alone
    again = okddip(*command, "hydra.sweep.dir=again")
    assert again.code == 1
    assert not list(tmp_path.glob("*/sweep-*.lock"))
    assert outcomes(tmp_path / "again")[1:] == [(1, "failed"), (2, "skipped"), (3, "finished before")]
    assert f"finished before, as MLflow run {runs(tmp_path)[1].info.run_id}" in again.out
    assert [run.info.run_id for run in runs(tmp_path, "parents")] == [parent.info.run_id]
    assert len(runs(tmp_path)) == 2

    # unless it is forced
    forced = okddip(
        "-m", *SMALL, "method.peers=3", "optimizer.lr=0.02,0.03", "trainer.epochs=2", "trainer.rerun=true"
    )
    assert forced.code == 0, forced.err
    assert len(runs(tmp_path)) == 4
    assert {run.info.status for run in runs(tmp_path, "parents")} == {"FAILED", "FINISHED"}


@pytest.mark.slow
def test_sweeps_with_other_shared_settings_are_other_sweeps(okddip: Okddip, tmp_path: Path) -> None:
    for epochs in (1, 2):
        answer = okddip("-m", *SMALL, "method=one", "seed=0,1", f"methods.ramp_epochs={epochs}")
        assert answer.code == 0, answer.err
        time.sleep(1)  # the sweep's folder is named by the second
    assert len(runs(tmp_path, "parents")) == 2


def test_a_sweep_without_a_sensible_job_fails(okddip: Okddip) -> None:
    answer = okddip("-m", *SMALL, "tracking=none", "method=one", "method.structure=network", "seed=0,1")
    assert answer.code == 1
    assert "2 jobs: 2 skipped" in answer.out


@pytest.mark.parametrize(
    ("tracking", "places"),
    [("tracking=none", ("multirun/0", "multirun/1")), ("tracking=mlflow", ("here", "else/where"))],
    ids=["beside it", "found in the store"],
)
def test_a_job_that_is_cut_off_goes_on(
    okddip: Okddip, monkeypatch: pytest.MonkeyPatch, tracking: str, places: tuple[str, str]
) -> None:
    whole = Trainer.train_epoch

    def part(self: Trainer, *arguments: Any) -> Any:
        if arguments[-1] == 1:
            raise RuntimeError("the power went")
        return whole(self, *arguments)

    command = ("-m", *SMALL, "method=baseline", tracking, "seed=0,1", "trainer.epochs=2")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", part)
        cut = okddip(*command, f"hydra.sweep.dir={places[0]}")
    assert cut.code == 1
    assert "failed #1 seed=1: RuntimeError: the power went" in cut.out
    answer = okddip(*command, f"hydra.sweep.dir={places[1]}")
    assert answer.code == 0, answer.err
    assert answer.out.count("goes on after epoch 1") == 2


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_job_gives_the_weights_that_it_gives_alone(okddip: Okddip, tmp_path: Path, compiled: bool) -> None:
    common = (
        *SMALL,
        "tracking=none",
        "trainer.epochs=2",
        "methods.teacher=auto",
        "methods.teacher_model=resnet14",
    )
    common += (f"trainer.compile={compiled}",)
    alone = [sys.executable, "-m", "okddip.main", *common, "hydra.run.dir=alone"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([*alone, "method=okddip", "seed=1"], check=True, env=environment, capture_output=True)
    kd = [*alone[:-1], "hydra.run.dir=alone_kd", "method=kd", "seed=1"]
    subprocess.run(kd, check=True, env=environment, capture_output=True)
    (tmp_path / "outputs").rename(tmp_path / "the teacher that was trained with it")

    answer = okddip(
        *("-m", *common, "method=dml,okddip,kd", "seed=1", "hydra.sweep.dir=sweep"),
        "hydra.sweep.subdir=${options.method}${seed}",
    )
    assert answer.code == 0, answer.err
    assert are_the_same(weights(tmp_path / "sweep" / "okddip1"), weights(tmp_path / "alone"))
    assert are_the_same(weights(tmp_path / "sweep" / "kd1"), weights(tmp_path / "alone_kd"))


@pytest.mark.slow
def test_a_teacher_is_trained_once_as_a_run_of_its_own(okddip: Okddip, tmp_path: Path) -> None:
    common = (*SMALL, "methods.teacher=auto", "methods.teacher_model=resnet14")
    assert okddip("-m", *common, "method=kd", "method.temperature=2,3", "hydra.sweep.dir=kd").code == 0
    [teacher] = runs(tmp_path, "others")
    assert teacher.info.run_name == "teacher baseline1-seed0-network-resnet14-digits"
    assert teacher.info.status == "FINISHED"
    assert [run.data.params["method.teacher"] for run in runs(tmp_path)] == ["auto", "auto"]
    [kind] = {run.data.tags["teacher"] for run in runs(tmp_path)}
    assert kind.startswith("resnet14-")

    # a job that is this very baseline is finished with it
    answer = okddip("-m", *common, "method=baseline", "model=resnet14,resnet8", "hydra.sweep.dir=baselines")
    assert answer.code == 0, answer.err
    assert outcomes(tmp_path / "baselines") == [(0, "finished before"), (1, "finished")]

    # another seed has another teacher
    assert okddip(*common, "method=kd", "seed=1").code == 0
    others = runs(tmp_path, "others")
    assert sorted(run.data.tags["seed"] for run in others) == ["0", "1", "1"]
    assert [run.data.tags["teacher"] for run in others if "teacher" in run.data.tags] == [kind]


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


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ("dataset=image_folder,digits", ["image_folder", "digits"]),
        ("dataset='image_folder',digits", ["image_folder", "digits"]),
        ("dataset=choice(image_folder)", ["image_folder"]),
        ("dataset=glob(im*)", ["image_folder", "imagenet"]),
        ("dataset=imagenet", ["imagenet"]),
        ("seed=0,1", ["cifar10"]),
    ],
)
def test_the_data_sets_of_a_sweep_are_known_however_they_are_written(given: str, options: list[str]) -> None:
    with initialize_config_dir(str(CONFIG_HOME / "conf"), version_base="1.3"):
        config = (
            GlobalHydra.instance()
            .config_loader()
            .load_configuration("config", [given], run_mode=RunMode.MULTIRUN)
        )
        assert datasets(config) == options


@pytest.mark.slow
def test_a_whole_number_is_the_same_setting_however_it_is_written(okddip: Okddip, tmp_path: Path) -> None:
    common = ("-m", *SMALL, "method=okddip", "seed=0")
    for place, temperature in (("first", "3"), ("second", "3.0")):
        answer = okddip(*common, f"method.temperature={temperature}", f"hydra.sweep.dir={place}")
        assert answer.code == 0, answer.err
    assert outcomes(tmp_path / "second") == [(0, "finished before")]


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


def test_a_setting_that_only_some_methods_have_is_swept_with_those(okddip: Okddip, tmp_path: Path) -> None:
    command = ("-m", *SMALL, "method=baseline,one", "tracking=none", "hydra.sweep.dir=sweep")
    answer = okddip(*command, "method.temperature=2,3")
    assert answer.code == 0, answer.err
    assert outcomes(tmp_path / "sweep") == [(0, "finished"), (1, "finished")]
    *_, summary, first, second = answer.out.splitlines()
    assert summary.endswith("4 jobs: 2 finished, 2 skipped.")
    assert first == (
        "skipped #2 method=baseline method.temperature=2: method.temperature: is no setting of the options"
        " chosen."
    )
    assert second.startswith("skipped #3 method=baseline method.temperature=3: ")

    mistyped = okddip(*command, "method.temprature=2,3", "tracking=mlflow")
    assert mistyped.code == 1
    assert "Could not override 'method.temprature'" in mistyped.err
    assert "no jobs." in mistyped.out
    assert not (tmp_path / "mlflow.db").exists()  # nor a parent run in it


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


@pytest.mark.parametrize("mode", ["RUN", "MULTIRUN"])
def test_a_working_directory_for_each_job_is_refused_by_name(okddip: Okddip, mode: str) -> None:
    answer = okddip(*SMALL, "hydra.job.chdir=true", f"hydra.mode={mode}")
    assert answer.code == 1
    assert "hydra.job.chdir=true: would make" in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.slow
def test_runs_of_another_experiment_and_deleted_ones_are_left_as_they_are(
    okddip: Okddip, tmp_path: Path
) -> None:
    command = ("-m", *SMALL, "method=baseline", "seed=0,1")
    assert okddip(*command).code == 0
    [parent], before = runs(tmp_path, "parents"), runs(tmp_path)
    answer = okddip(*command, "tracking.experiment=other")
    assert answer.code == 0, answer.err
    assert "is not in tracking.experiment=other: a new one is told of all epochs" in answer.out
    assert "2 jobs: 2 finished." in answer.out
    assert "baseline  2" in answer.out  # the table has both
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
    assert "is passed over: " in answer.out
    assert "teacher    baseline1-seed0-network-resnet8-digits, trained first" in answer.out


def test_several_presets_at_once_are_refused(okddip: Okddip) -> None:
    answer = okddip("-m", *SMALL, "tracking=none", "multirun_presets=quickstart,temperature")
    assert answer.code == 1
    assert "multirun_presets=quickstart,temperature: a preset is a sweep of its own" in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.slow
def test_another_store_is_told_of_runs_that_are_finished(okddip: Okddip, tmp_path: Path) -> None:
    command = ("-m", *SMALL, "method=baseline", "seed=0,1", "trainer.epochs=2")
    assert okddip(*command).code == 0
    [*first] = runs(tmp_path)
    (tmp_path / "else").mkdir()
    answer = okddip(*command, "tracking.uri=sqlite:///else/mlflow.db")
    assert answer.code == 0, answer.err
    assert answer.out.count("/else/mlflow.db: a new one is told of all epochs.") == 2
    assert answer.out.count("is finished after epoch 2, so nothing is trained") == 2
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/else/mlflow.db")
    for run, before in zip(runs(tmp_path / "else"), first, strict=True):
        assert run.data.metrics["final/top1"] == before.data.metrics["final/top1"]
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, "test/top1")] == [0, 1]
    for uri in ("sqlite:///mlflow.db", "sqlite:///else/mlflow.db"):
        assert "2 jobs: 2 finished before." in okddip(*command, f"tracking.uri={uri}").out

    shutil.move("mlflow.db", "moved.db")  # a store that is the same, in another place
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/moved.db")
    client.set_terminated(first[0].info.run_id, "KILLED")
    answer = okddip(*command, "tracking.uri=sqlite:///moved.db")
    assert "2 jobs: 1 finished, 1 finished before." in answer.out
    assert client.get_run(first[0].info.run_id).info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize("tracking", ["tracking=mlflow", "tracking=none"])
def test_a_teacher_is_waited_for_where_a_plain_run_trains_it(tmp_path: Path, tracking: str) -> None:
    common = (*SMALL, "trainer.epochs=9", tracking)
    place = {"tracking=none": "outputs/baseline1-seed0-network-resnet8-digits/plain"}.get(
        tracking, "else/where"
    )
    plain = start(tmp_path, *common, "method=baseline", f"hydra.run.dir={place}")
    while not (tmp_path / place / "last.pt").exists():
        assert plain.poll() is None, plain.communicate()[0]
        time.sleep(0.01)
    os.killpg(plain.pid, signal.SIGSTOP)
    teacher = ("method=kd", "method.teacher=auto", "method.teacher_model=resnet8")
    student = start(tmp_path, *common, *teacher, "hydra.run.dir=student")
    assert student.stdout is not None
    while "another process works on this very run" not in (line := student.stdout.readline()):
        assert line, "it did not wait"
    os.killpg(plain.pid, signal.SIGCONT)
    output, _ = plain.communicate(timeout=300)
    assert plain.returncode == 0, output
    output, _ = student.communicate(timeout=300)
    assert student.returncode == 0, output
    assert "is finished after epoch 9, so nothing is trained" in output
    if tracking == "tracking=mlflow":
        assert [run.info.status for run in runs(tmp_path, "others")] == ["FINISHED"] * 2


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


def test_an_outcome_that_cannot_be_read_does_not_keep_a_sweep_from_its_end(
    okddip: Okddip, tmp_path: Path
) -> None:
    (tmp_path / "sweep" / "torn").mkdir(parents=True)
    (tmp_path / "sweep" / "torn" / "outcome-0.json").write_text('{"job": 1')
    answer = okddip("-m", *SMALL, "method=baseline", "seed=0", "hydra.sweep.dir=sweep")
    assert answer.code == 0, answer.err
    assert "1 job: 1 finished." in answer.out
    assert [run.info.status for run in runs(tmp_path, "parents")] == ["FINISHED"]


def test_whatever_fails_at_the_end_of_a_sweep_is_shown_and_its_parent_closed(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no more handles")

    monkeypatch.setattr("okddip.sweeps.sweep.write_report", fail)
    answer = okddip("-m", *SMALL, "method=baseline", "seed=0")
    assert answer.code == 0
    assert "The end of the sweep is not whole:" in answer.out + answer.err
    assert "no more handles" in answer.out + answer.err
    assert "1 job: 1 finished." in answer.out
    assert [run.info.status for run in runs(tmp_path, "parents")] == ["FINISHED"]


def test_a_sweep_on_a_store_that_cannot_be_opened_runs_no_job(okddip: Okddip, tmp_path: Path) -> None:
    answer = okddip("-m", *SMALL, "seed=0,1", "tracking.uri=sqlite:///missing/mlflow.db")
    assert answer.code == 1
    assert "tracking.uri=sqlite:///missing/mlflow.db: this store cannot be opened" in answer.err
    assert not list(tmp_path.glob("multirun/*/[!.]*"))


def start(folder: Path, *overrides: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "okddip.main", *overrides],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_second_sweep_in_the_folder_of_one_that_goes_on_is_refused(okddip: Okddip, tmp_path: Path) -> None:
    common = ("-m", *SMALL, "method=baseline", "hydra.sweep.dir=sweep")
    first = start(tmp_path, *common, "seed=0,1", "trainer.epochs=1000")
    try:
        while not list(tmp_path.glob("sweep/0-*/outcome-*.json")):
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.01)
        [configuration] = tmp_path.glob("sweep/0-*/.hydra/config.yaml")
        before = configuration.read_text()
        answer = okddip(*common, "seed=0,1", "optimizer.lr=0.01")
        assert answer.code == 1
        assert f"hydra.sweep.dir={tmp_path}/sweep: another sweep goes on in this folder" in answer.err
        assert "Name another folder, or leave hydra.sweep.dir out" in answer.err
        assert configuration.read_text() == before
        answer = okddip(
            *common, "seed=0,1", "task=evaluate", "checkpoint=x"
        )  # one without a parent run neither
        assert "another sweep goes on in this folder" in answer.err
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    answer = okddip(*common, "seed=7,8")
    assert answer.code == 0, answer.err
    assert "2 jobs: 2 finished." in answer.out


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
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [*SMALL, "method=baseline", "seed=0,1,2", "trainer.epochs=40", "hydra.mode=MULTIRUN"]
    killed = start(tmp_path, *command)
    while not list(tmp_path.glob("multirun/*/1-*/previous.pt")):  # in the middle of the second job
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert [run.info.status for run in runs(tmp_path)] == ["FINISHED", "RUNNING"]

    again = start(tmp_path, *command)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert "3 jobs: 1 finished before, 2 finished." in output
    assert output.count("; goes on after epoch") == 1
    [parent] = runs(tmp_path, "parents")
    assert parent.info.status == "FINISHED"
    assert [run.info.status for run in runs(tmp_path)] == ["FINISHED"] * 3
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    for run in runs(tmp_path):
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        logged = client.get_metric_history(run.info.run_id, "test/top1")
        assert sorted(metric.step for metric in logged) == list(range(40))


@pytest.mark.slow
def test_a_forced_sweep_that_was_killed_goes_on_and_counts_nothing_from_before(tmp_path: Path) -> None:
    command = [*SMALL, "method=baseline", "seed=0,1,2", "trainer.epochs=40", "hydra.mode=MULTIRUN"]
    output, _ = start(tmp_path, *command).communicate(timeout=300)
    assert "3 jobs: 3 finished." in output
    [before] = runs(tmp_path, "parents")
    killed = start(tmp_path, *command, "trainer.rerun=true", "hydra.sweep.dir=multirun/forced")
    while not list(tmp_path.glob("multirun/forced/1-*/previous.pt")):
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    again = start(tmp_path, *command, "trainer.rerun=true")
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert "3 jobs: 1 finished before, 2 finished." in output
    assert output.count("; goes on after epoch") == 1
    _, forced = runs(tmp_path, "parents")
    for parent in (before, forced):
        own = [run for run in runs(tmp_path) if run.data.tags["mlflow.parentRunId"] == parent.info.run_id]
        assert [run.info.status for run in own] == ["FINISHED"] * 3
    output, _ = start(tmp_path, *command, "trainer.rerun=true").communicate(timeout=300)
    assert "3 jobs: 3 finished." in output  # the one before is finished: all is forced anew


@pytest.mark.slow
def test_what_a_killed_sweep_leaves_running_is_closed_by_the_next_sweep_whichever_it_is(
    tmp_path: Path,
) -> None:
    command = [*SMALL, "method=baseline", "seed=0,1", "trainer.epochs=1000", "hydra.mode=MULTIRUN"]
    killed = start(tmp_path, *command)
    while not list(tmp_path.glob("multirun/*/0-*/previous.pt")):
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.01)
    going_on = start(tmp_path, "-m", *SMALL, "method=baseline", "seed=7,8")
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
    output, _ = start(tmp_path, "-m", *SMALL, "method=baseline", "seed=9").communicate(timeout=300)
    assert "1 job: 1 finished." in output
    statuses = {run.info.run_id: run.info.status for run in runs(tmp_path, "parents")}
    assert statuses.pop(theirs) == "RUNNING"
    assert list(statuses.values()) == ["KILLED", "FINISHED", "FINISHED"]
    assert runs(tmp_path)[0].info.status == "KILLED"


def test_going_on_and_training_anew_at_once_is_refused(okddip: Okddip) -> None:
    answer = okddip("-m", *SMALL, "seed=0,1", "trainer.rerun=true", "trainer.resume=auto", "tracking=none")
    assert answer.code == 1
    assert "2 jobs: 2 failed" in answer.out
    assert "trainer.rerun=true, trainer.resume=auto: the first trains anew" in answer.out


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
    process = start(tmp_path, *SMALL, *launcher, "seed=0,1", "trainer.epochs=10000", "hydra.mode=MULTIRUN")
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
    process = start(tmp_path, *command)
    while len(list(tmp_path.glob("multirun/*/*/last.pt"))) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    assert "Sweep seed, 2 jobs: 2 cut off.\n" in lines
    assert "Jobs that submitit was given may go on, or begin, without this process.\n" in lines
    assert process.wait(60) == 128 + signal.SIGTERM
    again = start(tmp_path, *command)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert "Sweep seed, 2 jobs: 2 finished before." in output
    assert [run.info.status for run in runs(tmp_path, "parents") + runs(tmp_path)] == ["FINISHED"] * 3


@pytest.mark.slow
def test_a_teacher_whose_process_ends_with_its_sweep_is_not_called_running(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    teacher = ("method=kd", "method.teacher=auto", "method.teacher_model=resnet14")
    process = start(
        tmp_path, "-m", *SMALL, *teacher, "seed=0", "trainer.epochs=10000", "hydra/launcher=joblib"
    )
    while not list(tmp_path.glob("outputs/baseline1*/*/last.pt")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert [run.info.status for run in runs(tmp_path, "parents") + runs(tmp_path, "others")] == ["KILLED"] * 2


LONG_UPLOAD = """
import time
from mlflow import MlflowClient
MlflowClient.log_artifacts = lambda *_: time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.parametrize("change", ["", LONG_UPLOAD], ids=["writing", "waiting"])
def test_a_signal_while_a_sweep_is_reported_on_ends_it_as_killed(tmp_path: Path, change: str) -> None:
    program = f"{change}\nfrom okddip.main import cli\ncli()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "-m", *SMALL, "seed=0"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "Tables and figures" not in (line := process.stdout.readline()):
        assert line, "there was no report"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "1 job: 1 finished." in output
    assert [run.info.status for run in runs(tmp_path, "parents") + runs(tmp_path)] == ["KILLED", "FINISHED"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
        ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"),
    ],
    ids=["joblib", "submitit"],
)
def test_jobs_side_by_side_are_children_of_one_parent_and_share_a_teacher(
    tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    process = start(
        tmp_path,
        *("-m", *SMALL, *launcher, "method=kd", "method.teacher=auto", "method.teacher_model=resnet14"),
        *("method.temperature=2,3", "method.peers=1,4", "hydra.sweep.dir=sweep"),
    )
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert [kind for _, kind in outcomes(tmp_path / "sweep")] == ["finished", "skipped"] * 2
    [parent] = runs(tmp_path, "parents")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs(tmp_path)} == {parent.info.run_id}
    assert [run.info.status for run in [parent, *runs(tmp_path)]] == ["FINISHED"] * 3
    assert [run.info.run_name for run in runs(tmp_path, "others")] == [
        "teacher baseline1-seed0-network-resnet14-digits"
    ]


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
    process = subprocess.run(
        [sys.executable, "-m", "okddip.main", "-m", *command, "hydra.sweep.dir=sweep"],
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1, process.stdout + process.stderr
    kinds = ["finished", "cut off", "finished", "finished", "finished"]
    assert outcomes(tmp_path / "sweep") == list(enumerate(kinds))
    assert warning in process.stdout
    assert "5 jobs: 4 finished, 1 cut off." in process.stdout
    assert "cut off #1 seed=1: its process has not come to its end" in process.stdout
    assert "Traceback" not in process.stdout + process.stderr
    statuses = {run.data.tags["seed"]: run.info.status for run in runs(tmp_path)}
    assert statuses == {seed: "KILLED" if seed == "1" else "FINISHED" for seed in "01234"}
    [parent] = runs(tmp_path, "parents")
    assert parent.info.status == "FAILED"


THREADS = """
from pathlib import Path
import torch
from hydra.core.hydra_config import HydraConfig


def count(config, build):
    Path(HydraConfig.get().runtime.output_dir, "threads").write_text(str(torch.get_num_threads()))
    return 0.0
"""


@pytest.mark.slow
def test_threads_are_divided_among_the_jobs_of_joblib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "threads.py").write_text(THREADS)
    cores = len(os.sched_getaffinity(0))
    command = [
        "-m",
        "task._target_=threads.count",
        "seed=0,1",
        "hydra/launcher=joblib",
        "hydra.sweep.dir=sweep",
    ]
    finished = subprocess.run(
        [sys.executable, "-m", "okddip.main", *command, f"hydra.launcher.n_jobs={cores}"],
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert [path.read_text() for path in tmp_path.glob("sweep/*/threads")] == ["1", "1"]


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> list[torch.device]:
    """Let PyTorch see GPUs; the list gets those that become the current one."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(("gpus", "taken"), [(1, [0, 0, 0, 0, 0]), (3, [0, 1, 2, 0, 1])])
def test_jobs_side_by_side_take_the_visible_gpus_in_turn(
    configured: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, gpus: int, taken: list[int]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    current = pretend_gpus(monkeypatch, gpus)
    devices = []
    for job in range(5):
        configured("hydra/launcher=joblib", f"hydra.job.num={job}")
        devices += [find_device("auto", choose_gpu), find_device("cuda", choose_gpu)]
    assert devices == current == [torch.device("cuda", gpu) for gpu in taken for _ in range(2)]
    assert find_device("cuda:0", choose_gpu) == torch.device("cuda:0")
    assert find_device("cpu", choose_gpu) == torch.device("cpu")
    assert len(current) == 10


@pytest.mark.parametrize(
    "overrides", [[], ["hydra.job.num=1"], ["hydra/launcher=joblib"]], ids=["run", "sequential", "no job"]
)
def test_a_run_that_has_no_other_beside_it_takes_the_current_gpu(
    configured: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    current = pretend_gpus(monkeypatch, 3)
    configured(*overrides)
    assert find_device("auto", choose_gpu) == find_device("cuda", choose_gpu) == torch.device("cuda")
    assert current == []


def test_without_a_gpu_jobs_side_by_side_train_on_the_cpu(
    configured: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    pretend_gpus(monkeypatch, 0)
    configured("hydra/launcher=joblib", "hydra.job.num=1")
    assert find_device("auto", choose_gpu) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"trainer\.device=cuda: PyTorch sees 0 CUDA devices"):
        find_device("cuda", choose_gpu)


DEVICES = """
import os
from pathlib import Path
import torch
from hydra.core.hydra_config import HydraConfig
from okddip.run.resume import identity
from okddip.sweeps.sweep import gpu_in_turn
from okddip.training.devices import find_device

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 3
torch.cuda.set_device = lambda device: None


def note(config, build):
    facts = f"{find_device(config.trainer.device, gpu_in_turn)} {identity(config)} {os.getpid()}"
    Path(HydraConfig.get().runtime.output_dir, "facts").write_text(facts)
    return 0.0
"""


@pytest.mark.slow
def test_a_job_is_the_same_on_whatever_gpu_it_runs(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "devices.py").write_text(DEVICES)

    def facts(folder: str, *launcher: str) -> list[list[str]]:
        command = [sys.executable, "-m", "okddip.main", "-m", "task._target_=devices.note", "seed=0,1,2,3,4"]
        finished = subprocess.run(
            [*command, f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=${hydra.job.num}", *launcher],
            env=os.environ | {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}"},
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return [(tmp_path / folder / str(job) / "facts").read_text().split() for job in range(5)]

    beside = facts("beside", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    alone = facts("alone")
    assert [device for device, _, _ in beside] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]
    assert [device for device, _, _ in alone] == ["cuda"] * 5
    assert [identity for _, identity, _ in beside] == [identity for _, identity, _ in alone]
    assert len({process for _, _, process in beside}) < 5  # one process has jobs on several GPUs


def processes_of(session: int) -> list[int]:
    """Of a session, those that are no zombies."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its = (process / "stat").read_text().rpartition(") ")[2].split()[:4]
        except (OSError, ValueError):  # it has ended
            continue
        if int(its) == session and state != "Z":
            found.append(int(process.name))
    return found


@pytest.mark.slow
def test_processes_of_joblib_end_after_their_job_when_the_sweep_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = start(
        tmp_path,
        *("-m", *SMALL, "method=baseline", "seed=0,1,2", "trainer.epochs=60", "hydra.sweep.dir=sweep"),
        *("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    )
    while len(list(tmp_path.glob("sweep/*/previous.pt"))) < 2:
        assert sweep.poll() is None, sweep.communicate()[0]
        time.sleep(0.01)
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()
    assert processes_of(sweep.pid)
    deadline = time.monotonic() + 120
    while left := processes_of(sweep.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
    kinds = [kind for _, kind in outcomes(tmp_path / "sweep")]
    assert kinds.count("finished") >= 2  # what they had begun


@pytest.mark.slow
def test_a_sweep_of_one_process_of_joblib_outlives_the_shell_that_started_it(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    command = [sys.executable, "-m", "okddip.main", "-m", *SMALL, "method=baseline", "seed=0,1,2"]
    command += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=1", "hydra.sweep.dir=sweep", "tracking=none"]
    command += ["trainer.epochs=60"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    until_it_trains = "while [ ! -e sweep/0-*/previous.pt ]; do sleep 0.1; done"
    shell = f"{shlex.join(command)} > log 2>&1 & {until_it_trains}"
    subprocess.run(shell, shell=True, cwd=tmp_path, env=environment, timeout=120)
    deadline = time.monotonic() + 300
    while "Sweep seed, 3 jobs: 3 finished." not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.5)


@pytest.mark.slow
def test_optuna_maximizes_what_jobs_return_and_passes_over_those_that_fail(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    process = start(
        tmp_path,
        *("-m", *SMALL[:-1], "trainer.epochs=2", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid"),
        *("hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"),
        *("optimizer.lr=choice(0.0001,0.05,1e30)", "hydra.sweep.dir=sweep", "method=baseline"),
        "trainer.limit_batches=8",
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output  # one failed
    assert sorted(kind for _, kind in outcomes(tmp_path / "sweep")) == ["failed", "finished", "finished"]
    best = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert best.best_params["optimizer.lr"] == 0.05
    assert best.best_value == max(run.data.metrics.get("final/top1", 0) for run in runs(tmp_path))


def test_optuna_is_not_let_to_look_for_the_worst_accuracy(okddip: Okddip) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    answer = okddip("-m", *SMALL, "hydra/sweeper=optuna", "optimizer.lr=interval(0.01,0.3)", "tracking=none")
    assert answer.code == 1
    assert "hydra.sweeper.direction=minimize: " in answer.err
    assert "Add hydra.sweeper.direction=maximize." in answer.err


@pytest.mark.slow
def test_what_ends_a_study_of_optuna_is_among_its_last_lines(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    process = start(
        tmp_path,
        *("-m", *SMALL, "tracking=none", "hydra/sweeper=optuna", "hydra/sweeper/sampler=random"),
        *("hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=8", "hydra.sweeper.n_jobs=1"),
        *("method=choice(one,baseline)", "method.temperature=choice(2,3)"),
        "hydra.sweeper.sampler.seed=2",  # draws ONE first
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    assert "jobs: 3 finished." in output
    assert output.endswith("The sweep itself ended early: Could not override 'method.temperature'.\n"), output
