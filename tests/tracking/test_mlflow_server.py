"""MLflow as a team runs it: one server for all, its store in PostgreSQL, artifacts through the server."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Answer
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow_stores import free_port, mlflow_server
from omegaconf import OmegaConf
from program import REPOSITORY, Program

from okddip.run.folder import RunFolder
from okddip.run.identity import run_identity
from okddip.run.references import find_checkpoint
from okddip.run.summary import run_params
from okddip.training import checkpoint

pytestmark = pytest.mark.slow

SMALL = ("dataset=digits", "model=resnet8", "trainer.epochs=2", "trainer.limit_batches=1")


@pytest.fixture
def database() -> Iterator[str]:
    """The URI of an empty database in PostgreSQL."""
    pytest.importorskip("psycopg")
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("no PostgreSQL here; tests/postgresql.sh install gets it")
    with subprocess.Popen(
        [REPOSITORY / "tests" / "postgresql.sh"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        uri = process.stdout.readline().strip()
        assert uri, process.stderr.read()
        yield uri
        process.stdin.close()


def runs(uri: str) -> tuple[MlflowClient, list[Run]]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("okddip")
    assert experiment is not None
    return client, client.search_runs([experiment.experiment_id])


def lacks_nothing(client: MlflowClient, run: Run, uri: str) -> None:
    """Compare a finished run with what lies in its folder."""
    folder = Path(run.data.tags["folder"])
    state = checkpoint.load(folder / "last.pt")
    assert run.info.status == "FINISHED"
    assert run.data.params == run_params(state["config"])
    assert run.data.tags["identity"] == run_identity(OmegaConf.create(state["config"]))
    assert run.data.tags["mlflow.runName"] == state["config"]["name"]

    epochs = RunFolder(folder).read_metrics()
    assert [epoch for epoch, _, _ in epochs] == [1, 2]
    summary = {"final/top1", "best/top1"}
    by_epoch = {metric for _, _, results in epochs for metric in results if "/attention/" not in metric}
    assert run.data.metrics.keys() == by_epoch | summary
    for metric in run.data.metrics.keys() - summary:
        points = client.get_metric_history(run.info.run_id, metric)
        assert sorted((point.step, point.timestamp, point.value) for point in points) == [
            (epoch, timestamp_ms, results[metric]) for epoch, timestamp_ms, results in epochs
        ]
    assert [len(client.get_metric_history(run.info.run_id, metric)) for metric in summary] == [1, 1]
    assert run.data.metrics["final/top1"] == epochs[-1][2]["test/top1"]

    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    attention = {"attention.csv", "attention.png"} if "attention" in run.data.tags else set()
    assert files - attention == {
        "config.yaml",
        "command.txt",
        "last.pt",
        "best.pt",
        "metrics.jsonl",
        "main.log",
    }
    for file in ("last.pt", "best.pt"):
        downloaded = find_checkpoint("checkpoint", f"runs:/{run.info.run_id}/{file}", uri)
        assert downloaded.parent != folder
        assert downloaded.read_bytes() == (folder / file).read_bytes()
        checkpoint.load(downloaded)


def test_a_server_gets_all_of_eight_jobs_side_by_side(database: str, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    options = ("--backend-store-uri", database, "--artifacts-destination", f"{tmp_path}/artifacts")
    with mlflow_server(tmp_path, port, *options, "--serve-artifacts", "--workers", "2"):
        sweep = Program(
            tmp_path,
            *("-m", *SMALL, "method=baseline,okddip", "seed=0,1,2,3"),
            *("hydra/launcher=joblib", "hydra.launcher.n_jobs=8", f"tracking.uri={uri}"),
        )
        output, _ = sweep.communicate(timeout=500)
        assert sweep.returncode == 0, output
        assert "8 jobs: 8 finished." in output
        assert "lacks" not in output
        client, stored = runs(uri)
        [parent] = [run for run in stored if run.data.tags.get("kind") == "sweep"]
        jobs = [run for run in stored if run is not parent]
        assert parent.info.status == "FINISHED"
        assert parent.data.params == {"sweep.method": "baseline,okddip", "sweep.seed": "0,1,2,3"}
        assert sorted((run.data.tags["method"], run.data.tags["seed"]) for run in jobs) == [
            (method, str(seed)) for method in ("baseline", "okddip") for seed in range(4)
        ]
        assert {run.data.tags["mlflow.parentRunId"] for run in jobs} == {parent.info.run_id}
        for run in jobs:
            lacks_nothing(client, run, uri)
        report = [file.path for file in client.list_artifacts(parent.info.run_id, "report")]
        assert "report/table.txt" in report
        table = client.download_artifacts(parent.info.run_id, "report/table.txt")
        [folder] = tmp_path.glob("multirun/*/report")
        assert Path(table).read_text() == (folder / "table.txt").read_text()
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "mlruns").exists()


def test_the_program_writes_into_postgresql_itself(
    database: str, okddip: Callable[..., Answer], tmp_path: Path
) -> None:
    answer = okddip(*SMALL, "method=baseline", f'tracking.uri="{database}"')
    assert answer.code == 0, answer.err
    client, [run] = runs(database)
    lacks_nothing(client, run, database)
    assert okddip("task=report", f'tracking.uri="{database}"').code == 0


def test_eight_processes_share_a_database_that_is_empty(database: str, tmp_path: Path) -> None:
    code = """
import sys
from okddip.tracking.tracker import MLflow
tracker = MLflow(sys.argv[1], "shared")
tracker.open()
tracker.start("run", {}, {}, "", "okddip")
tracker.finish("FINISHED")
"""
    processes = [Program(tmp_path, database, code=code) for _ in range(8)]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert (process.returncode, output) == (0, "")
    client = MlflowClient(database)
    experiment = client.get_experiment_by_name("shared")
    assert experiment is not None
    statuses = [run.info.status for run in client.search_runs([experiment.experiment_id])]
    assert statuses == ["FINISHED"] * 8
