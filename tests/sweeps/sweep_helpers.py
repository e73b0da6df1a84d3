"""What the tests of sweeps share: a small run, processes of the program, and what they leave behind."""

import json
from collections.abc import Callable
from pathlib import Path

import mlflow
from conftest import Answer
from mlflow.entities import Run

Okddip = Callable[..., Answer]


SMALL = (
    "dataset=digits",
    "model=resnet8",
    "trainer.epochs=1",
    "trainer.limit_batches=1",
    "optimizer.lr=0.02",
)


def runs(folder: Path, kind: str = "jobs") -> list[Run]:
    """Runs of the store in a folder, oldest first: the jobs of sweeps, their parents, or others."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("okddip")
    assert experiment is not None
    found = {
        "parents": lambda tags: tags.get("kind") == "sweep",
        "jobs": lambda tags: "sweep" in tags and "kind" not in tags,
        "others": lambda tags: not {"kind", "sweep"} & tags.keys(),  # teachers among them
    }[kind]
    stored = client.search_runs([experiment.experiment_id])
    return sorted((run for run in stored if found(run.data.tags)), key=lambda run: run.info.start_time)


def outcomes(folder: Path) -> list[tuple[int, str]]:
    read = [json.loads(path.read_text()) for path in folder.glob("*/outcome-*.json")]
    return sorted((outcome["job"], outcome["kind"]) for outcome in read)
