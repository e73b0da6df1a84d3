"""Runs for tests of resuming: short ones, what they leave behind, and what cuts them off."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from conftest import Answer
from PIL import Image
from program import Program

from okddip.training import checkpoint
from okddip.training.trainer import Trainer

Okddip = Callable[..., Answer]
SMALL = (
    "dataset=digits",
    "model=resnet8",
    "trainer.epochs=4",
    "trainer.limit_batches=3",
    "trainer.batch_size=32",
    "trainer.eval_batch_size=64",
    "optimizer.lr=0.02",
)


def lengthened(command: tuple[str, ...]) -> list[str]:
    return [part.replace("epochs=4", "epochs=6") for part in command]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load(folder / "last.pt")
    assert state["epoch"] == state["config"]["trainer"]["epochs"] - 1
    moments = {
        f"{name}{index}": value
        for index, values in state["optimizer"]["state"].items()
        for name, value in values.items()
    }
    return {**state["group"], **state["method"], **moments}


def are_the_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def cut_off(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Let training end with an exception in the middle of an epoch."""
    whole = Trainer.train_epoch

    def part(self: Trainer, *arguments: Any) -> Any:
        if arguments[-1] == epoch:
            raise RuntimeError("the power went")
        return whole(self, *arguments)

    monkeypatch.setattr(Trainer, "train_epoch", part)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def the_run(client: mlflow.MlflowClient) -> Any:
    experiment = client.get_experiment_by_name("okddip")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    return run


def assert_told_once(client: mlflow.MlflowClient, folder: Path, epochs: int = 4) -> None:
    """The one run of the store is finished, and has what `metrics.jsonl` says, once."""
    run = the_run(client)
    assert run.info.status == "FINISHED"
    lines = lines_of(folder)
    assert [line["epoch"] for line in lines] == list(range(1, epochs + 1))
    for name in ("train/loss", "test/top1", "train/images_per_second"):
        logged = client.get_metric_history(run.info.run_id, name)
        assert [(m.step, m.timestamp, m.value) for m in sorted(logged, key=lambda m: m.step)] == [
            (line["epoch"], line["timestamp_ms"], line[name]) for line in lines
        ], name
    final = client.get_metric_history(run.info.run_id, "final/top1")  # a run made longer ends more than once
    assert len(final) == len({metric.timestamp for metric in final})
    assert run.data.metrics["final/top1"] == lines[-1]["test/top1"]


STREAMED = (
    *("dataset=imagenet", "dataset.root=images", "dataset.image_size=32", "dataset.resize=32"),
    *("model=resnet8", "method=okddip", "trainer.batch_size=8"),
)


def draw_folders(root: Path) -> None:
    """Folders of small images in two classes."""
    pixels = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(pixels.integers(0, 256, (40, 40, 3), dtype=np.uint8))
                image.save(root / split / label / f"{number}.png")


TINY = ("method=baseline", *SMALL)


BARE = (*TINY, "tracking=none")


def wait_for(folder: Path, pattern: str, process: Program) -> None:
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
