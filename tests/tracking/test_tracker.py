"""A run in an MLflow store, from its start to its end."""

import inspect
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate
from mlflow_stores import history, start, stored, text_of
from omegaconf import DictConfig

from okddip.errors import ConfigError
from okddip.tracking.params import MAX_PARAM_LENGTH, MAX_TAG_LENGTH, params_of
from okddip.tracking.tracker import DatasetSplit, MLflow, NoTracking

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_run_holds_its_name_params_tags_configuration_and_command(tracker: MLflow) -> None:
    run_id = start(tracker)
    run = stored(tracker)
    assert run.info.run_id == run_id
    assert run.info.run_name == "okddip resnet8 seed0"
    assert run.info.status == "RUNNING"
    assert run.data.params == {"method.peers": "4", "seed": "0"}
    assert run.data.tags["device"] == "cpu"
    assert run.data.tags["command"] == "okddip seed=0"
    assert run.data.tags["host"] == socket.gethostname()
    assert run.data.tags["mlflow.user"]
    assert text_of(tracker, "config.yaml") == "seed: 0\n"
    assert text_of(tracker, "command.txt") == "okddip seed=0\n"


def test_params_beyond_one_request_and_long_values_are_kept(tracker: MLflow) -> None:
    many = {f"option{i}": i for i in range(250)}
    start(tracker, params={"model": many, "long": "x" * 7000, "été +1": True})
    params = stored(tracker).data.params
    assert params["model.option249"] == "249"
    assert len(params["long"]) == MAX_PARAM_LENGTH
    assert params["long"].endswith("...")
    assert params["été _1"] == "true"
    assert len(params) == 252


def test_metrics_have_the_epoch_as_step(tracker: MLflow) -> None:
    start(tracker)
    for epoch in range(3):
        tracker.log({"train/loss": 1 / (1 + epoch), "test/peer0/top1": 90.0 + epoch}, epoch)
    assert [point[:2] for point in history(tracker, "train/loss")] == [(0, 1.0), (1, 1 / 2), (2, 1 / 3)]
    assert stored(tracker).data.metrics["test/peer0/top1"] == 92.0


def test_more_metrics_than_one_request_takes_are_kept(tracker: MLflow) -> None:
    start(tracker)
    tracker.log({f"metric{i}": i for i in range(1500)}, epoch=0)
    assert len(stored(tracker).data.metrics) == 1500


def test_a_metric_sent_again_with_its_timestamp_is_not_doubled(tracker: MLflow) -> None:
    start(tracker)
    for _ in range(2):
        tracker.log({"train/loss": 0.5}, epoch=7, timestamp_ms=1_700_000_000_000)
    assert history(tracker, "train/loss") == [(7, 0.5, 1_700_000_000_000)]


def test_files_become_artifacts(tracker: MLflow, tmp_path: Path) -> None:
    start(tracker)
    (tmp_path / "last.pt").write_text("weights")
    tracker.log_artifact(tmp_path / "last.pt", "checkpoints")
    tracker.log_artifact(tmp_path / "last.pt")
    assert text_of(tracker, "checkpoints/last.pt") == "weights"
    assert text_of(tracker, "last.pt") == "weights"


def test_a_file_that_is_gone_is_warned_about_and_stops_nothing(
    tracker: MLflow, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(tracker)
    tracker.log_artifact(tmp_path / "gone.pt")
    assert "gone.pt" in caplog.text
    tracker.log({"train/loss": 1.0}, epoch=0)
    assert stored(tracker).data.metrics == {"train/loss": 1.0}


def test_data_sets_are_in_their_own_field_once(tracker: MLflow) -> None:
    run_id = start(tracker)
    splits = {
        "train": DatasetSplit("digits", "0" * 16, "/data", 1438),
        "test": DatasetSplit("digits", "1" * 16, "/data", 359),
    }
    tracker.log_datasets(splits)
    start(tracker, run_id=run_id)
    tracker.log_datasets(splits)
    used = {tag.value: used.dataset for used in stored(tracker).inputs.dataset_inputs for tag in used.tags}
    assert len(stored(tracker).inputs.dataset_inputs) == 2
    assert {context: (dataset.name, dataset.digest) for context, dataset in used.items()} == {
        "train": ("digits", "0" * 16),
        "test": ("digits", "1" * 16),
    }


def test_metrics_arrive_with_results_first(tracker: MLflow) -> None:
    start(tracker)
    tracker.log({"train/lr": 1, "train/top1": 2, "test/peer0/top1": 3, "test/loss": 4, "test/top1": 5}, 0)
    names = list(stored(tracker).data.metrics)
    assert names == ["test/top1", "test/loss", "test/peer0/top1", "train/top1", "train/lr"]


def test_tags_can_be_replaced(tracker: MLflow) -> None:
    start(tracker)
    tracker.set_tags({"device": "cuda", "note": "y" * 9000})
    tags = stored(tracker).data.tags
    assert tags["device"] == "cuda"
    assert len(tags["note"]) == MAX_TAG_LENGTH


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_with_its_status(tracker: MLflow, status: str) -> None:
    start(tracker)
    tracker.finish(status)
    info = stored(tracker).info
    assert info.status == status
    assert info.end_time >= info.start_time


def test_a_run_goes_on_and_a_changed_param_becomes_a_tag(tracker: MLflow) -> None:
    first = start(tracker, params={"trainer": {"epochs": 10}, "seed": 0})
    tracker.finish("KILLED")
    params = {"trainer": {"epochs": 20, "resume": "auto"}, "seed": 0}
    again = MLflow(tracker.uri, tracker.experiment)
    again.open()
    assert start(again, params=params, command="okddip trainer.epochs=20", run_id=first) == first
    run = stored(again)
    assert run.info.status == "RUNNING"
    assert run.data.params == {"trainer.epochs": "10", "trainer.resume": "auto", "seed": "0"}
    resumed = {key: value for key, value in run.data.tags.items() if key.startswith("resumed.")}
    assert resumed == {"resumed.trainer.epochs": "20"}
    assert run.data.tags["command"] == "okddip trainer.epochs=20"
    assert params_of(run) == {"trainer.epochs": "20", "trainer.resume": "auto", "seed": "0"}

    again.finish("KILLED")  # and back
    start(again, params={"trainer": {"epochs": 10, "resume": "auto"}, "seed": 0}, run_id=first)
    assert params_of(stored(again))["trainer.epochs"] == "10"


def test_a_run_that_does_not_exist_cannot_go_on(tracker: MLflow) -> None:
    with pytest.raises(ConfigError, match=r"0123abc.*tracking\.uri"):
        start(tracker, run_id="0123abc")


def test_two_runs_of_one_process_do_not_meet(uri: str) -> None:
    one, two = MLflow(uri, "one"), MLflow(uri, "two")
    for tracker in (one, two):
        tracker.open()
        start(tracker)
    one.log({"train/loss": 1.0}, epoch=0)
    two.log({"train/loss": 2.0}, epoch=0)
    one.finish("FAILED")
    assert stored(one).data.metrics == {"train/loss": 1.0}
    assert stored(two).data.metrics == {"train/loss": 2.0}
    assert stored(two).info.status == "RUNNING"


def test_no_tracking_has_the_interface_of_mlflow(tmp_path: Path) -> None:
    def interface(kind: type) -> set[str]:
        return {name for name, _ in inspect.getmembers(kind, callable) if not name.startswith("_")}

    assert interface(NoTracking) == interface(MLflow)
    tracker = NoTracking()
    tracker.open()
    assert start(tracker) == ""
    tracker.finish("FINISHED")


@pytest.mark.parametrize(("option", "kind"), [("mlflow", MLflow), ("none", NoTracking)])
def test_option_files_build_a_tracker(option: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = instantiate(yaml.safe_load((REPOSITORY / f"conf/tracking/{option}.yaml").read_text()))
    assert type(tracker) is kind


def test_the_experiment_is_the_environments_unless_it_is_typed(
    configured: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert configured().tracking.experiment == "okddip"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the project")
    assert configured().tracking.experiment == "of the project"
    assert configured("tracking.experiment=typed").tracking.experiment == "typed"


def test_nothing_heavy_is_imported_before_a_store_is_opened() -> None:
    code = (
        "import sys, okddip.tracking.tracker as t; t.MLflow('sqlite:///x.db', 'e'); "
        "print({'mlflow', 'sqlalchemy', 'torch', 'requests'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert answer.stdout.strip() == "set()", answer.stderr


@pytest.mark.parametrize("switch", ["checkpoints", "system_metrics"])
def test_a_switch_that_is_neither_on_nor_off_is_refused(tmp_path: Path, switch: str) -> None:
    switches: Any = {switch: "maybe"}
    with pytest.raises(ConfigError, match=rf"tracking\.{switch}=maybe"):
        MLflow(f"sqlite:///{tmp_path}/mlflow.db", "first", **switches).open()
    assert list(tmp_path.iterdir()) == []
