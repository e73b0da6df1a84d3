"""A project's folder that is moved or copied, with the store in it."""

import shutil
from pathlib import Path

import pytest
from mlflow_stores import start, stored

from okddip.errors import ConfigError
from okddip.run.references import find_checkpoint
from okddip.tracking.tracker import MLflow
from okddip.tracking.unsent import send_unsent, unsent_file


@pytest.fixture
def project(uri: str, tmp_path: Path) -> Path:
    """A folder with a store and a finished run with a checkpoint, whose tag `run` is its name."""
    project = tmp_path / "an öld project"
    (project / "outputs" / "run").mkdir(parents=True)
    shutil.copy(uri.removeprefix("sqlite:///"), project / "mlflow.db")
    begin(project, "first")
    return project


def begin(project: Path, content: str) -> MLflow:
    tracker = MLflow(f"sqlite:///{project}/mlflow.db", "mine")
    tracker.open()
    run = project / "outputs" / "run"
    (run / "last.pt").write_text(content)
    start(tracker, tags={"folder": str(run)})
    tracker.log_artifact(run / "last.pt")
    tracker.finish("FINISHED")
    return tracker


def runs_of(project: Path) -> dict[str, str]:
    """The folder of each run of a store."""
    tracker = MLflow(f"sqlite:///{project}/mlflow.db", "mine")
    tracker.open()
    return {run.info.run_id: run.data.tags["folder"] for run in tracker.find({})}


def checkpoint_of(project: Path, run_id: str) -> str:
    return find_checkpoint("checkpoint", f"runs:/{run_id}", f"sqlite:///{project}/mlflow.db").read_text()


def test_a_moved_project_has_its_checkpoints_and_its_runs_folders(project: Path, tmp_path: Path) -> None:
    [run_id] = runs_of(project)
    moved = project.rename(tmp_path / "moved")
    assert runs_of(moved) == {run_id: str(moved / "outputs" / "run")}
    assert checkpoint_of(moved, run_id) == "first"
    tracker = begin(moved, "second")
    assert (
        stored(tracker).info.artifact_uri == (moved / "mlartifacts" / tracker.run_id / "artifacts").as_uri()
    )
    assert checkpoint_of(moved, tracker.run_id) == "second"
    assert not project.exists()


def test_a_copied_project_leaves_the_original_alone(project: Path, tmp_path: Path) -> None:
    [run_id] = runs_of(project)
    copy = Path(shutil.copytree(project, tmp_path / "copy"))
    begin(copy, "of the copy")
    assert set(runs_of(copy).values()) == {str(copy / "outputs" / "run")}
    assert runs_of(project) == {run_id: str(project / "outputs" / "run")}
    assert [folder.name for folder in (project / "mlartifacts").iterdir()] == [run_id]


def test_a_store_that_is_copied_alone_finds_what_was_left_behind(project: Path, tmp_path: Path) -> None:
    runs = runs_of(project)
    (tmp_path / "alone").mkdir()
    shutil.copy(project / "mlflow.db", tmp_path / "alone")
    assert runs_of(tmp_path / "alone") == runs
    assert checkpoint_of(tmp_path / "alone", *runs) == "first"


def test_what_is_away_for_a_while_is_found_when_it_is_back(project: Path, tmp_path: Path) -> None:
    runs = runs_of(project)
    (tmp_path / "store").mkdir()
    (project / "mlflow.db").rename(tmp_path / "store" / "mlflow.db")
    away = project.rename(tmp_path / "away")  # as a disk that is not mounted
    assert runs_of(tmp_path / "store") == runs
    away.rename(project)
    assert checkpoint_of(tmp_path / "store", *runs) == "first"


def test_a_store_under_another_name_of_its_folder_is_not_moved(project: Path, tmp_path: Path) -> None:
    runs = runs_of(project)
    (tmp_path / "link").symlink_to(project)
    assert runs_of(tmp_path / "link") == runs


def test_what_is_missing_is_said_of_a_run_and_of_its_checkpoint(project: Path) -> None:
    [run_id] = runs_of(project)
    with pytest.raises(ConfigError, match="has no such run"):
        checkpoint_of(project, "0" * 32)
    shutil.rmtree(project / "mlartifacts")
    with pytest.raises(
        ConfigError, match=r"has this run without last.pt, which is not in .*moved or removed"
    ):
        checkpoint_of(project, run_id)


def test_what_a_moved_run_could_not_send_is_sent_from_where_it_lies(project: Path, tmp_path: Path) -> None:
    tracker = begin(project, "first")
    folder = (project / "outputs" / "run").rename(tmp_path / "run")
    (folder / "best.pt").write_text("best")
    note = unsent_file(folder, tracker.run_id)
    note.write_text(f'[["best.pt", "file", ["{project}/outputs/run/best.pt", null]]]')
    send_unsent(tracker.store.client, tracker.run_id, note)
    assert {file.path for file in tracker.store.client.list_artifacts(tracker.run_id)} >= {"best.pt"}
