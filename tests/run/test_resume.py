"""Runs that are cut off go on as if nothing had happened."""

import json
import os
import pydoc
import random
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
import numpy as np
import pytest
import torch
from conftest import Answer, folders_of_images
from omegaconf import DictConfig
from PIL import Image

from okddip.run.identity import run_identity
from okddip.tracking.tracker import MLflow
from okddip.training import checkpoint
from okddip.training.trainer import Trainer

Okddip = Callable[..., Answer]
REPOSITORY = Path(__file__).parents[2]
SMALL = (
    "dataset=digits",
    "model=resnet8",
    "trainer.epochs=4",
    "trainer.limit_batches=3",
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


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=okddip", "scheduler.milestones=[0.5]"],
        pytest.param(
            ["method=okddip", "method.structure=network", "method.peers=3", "trainer.precision=bf16"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["method=baseline", "optimizer=adamw", "optimizer.lr=0.001", "trainer.gradient_clip=1"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["method=independent"], marks=pytest.mark.slow),
        pytest.param(["method=dml", "scheduler=cosine"], marks=pytest.mark.slow),
        pytest.param(["method=cl_ilr"], marks=pytest.mark.slow),
        ["method=one", "trainer.precision=bf16"],
        ["method=kd", "method.teacher=teacher/last.pt"],
        pytest.param(
            ["method=okddip", "model=densenet40_12", "model.dropout=0.2", "trainer.epochs=2"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["method=okddip", "trainer.precision=bf16", "trainer.compile=true"], marks=pytest.mark.slow
        ),
        pytest.param(["method=one", "trainer.compile=true"], marks=pytest.mark.slow),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    if "method=kd" in overrides:
        assert okddip(*SMALL, "tracking=none", "method=baseline", "hydra.run.dir=teacher").code == 0
    command = [*SMALL, "tracking=none", *overrides]
    assert okddip(*command, "hydra.run.dir=runs/whole").code == 0
    (tmp_path / "runs" / "whole" / "run.json").unlink()  # else it is the run that is found
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=1)
        assert okddip(*command, "hydra.run.dir=runs/cut").code == 1
    answer = okddip(*command, "hydra.run.dir=runs/again", "trainer.resume=auto")
    assert answer.code == 0, answer.err
    assert "resumes after epoch 1" in answer.out
    assert not (tmp_path / "runs" / "again" / "last.pt").exists()
    assert are_the_same(weights(tmp_path / "runs" / "whole"), weights(tmp_path / "runs" / "cut"))


def test_a_resumed_run_has_every_metric_once_in_the_same_mlflow_run(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=2)
        assert okddip(*SMALL).code == 1
    [folder] = (tmp_path / "outputs").glob("*/*")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "timestamp_ms": 1, "train/loss": 9')  # a line that was being written
    assert okddip(*SMALL, "trainer.resume=auto").code == 0

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("okddip").experiment_id])
    assert run.info.status == "FINISHED"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    for name in set(lines[0]) - {"epoch", "timestamp_ms"}:
        logged = client.get_metric_history(run.info.run_id, name)
        assert [(m.step, m.timestamp, m.value) for m in sorted(logged, key=lambda m: m.step)] == [
            (line["epoch"], line["timestamp_ms"], line[name]) for line in lines
        ], name
    for name in ("final/top1", "best/top1", "best/epoch"):
        assert len(client.get_metric_history(run.info.run_id, name)) == 1


def test_a_finished_run_is_not_trained_again(okddip: Okddip, tmp_path: Path) -> None:
    assert okddip(*SMALL, "tracking=none").code == 0
    [folder] = (tmp_path / "outputs").glob("*/*")
    before = (folder / "last.pt").read_bytes()
    answer = okddip(*SMALL, "tracking=none", "trainer.resume=auto")
    assert answer.code == 0
    assert "leader *" in answer.out
    assert (folder / "last.pt").read_bytes() == before


def test_another_configuration_is_another_run(okddip: Okddip, tmp_path: Path) -> None:
    assert okddip(*SMALL, "tracking=none").code == 0
    answer = okddip(*SMALL, "tracking=none", "optimizer.momentum=0.8", "trainer.resume=auto")
    assert "a new one" in answer.out
    assert len(list((tmp_path / "outputs").glob("*/*/last.pt"))) == 2


def test_going_on_with_other_settings_is_refused_with_the_differences(okddip: Okddip) -> None:
    assert okddip(*SMALL, "tracking=none", "hydra.run.dir=run").code == 0
    answer = okddip(*SMALL, "tracking=none", "trainer.resume=run/last.pt", "optimizer.lr=0.01", "seed=2")
    assert answer.code == 1
    assert "optimizer.lr: 0.02 there, 0.01 here" in answer.err
    assert "seed: 0 there, 2 here" in answer.err
    assert "trainer.epochs: " not in answer.err


def test_a_run_is_the_same_on_another_gpu(configured: Callable[..., DictConfig]) -> None:
    assert run_identity(configured("trainer.device=cuda:1")) == run_identity(
        configured("trainer.device=cuda")
    )
    # whose precision is another
    assert run_identity(configured("trainer.device=cpu")) != run_identity(configured())
    assert run_identity(configured("trainer.tf32=false")) != run_identity(configured())


@pytest.mark.parametrize("by_id", [False, True])
def test_more_epochs_go_on_in_the_same_run(okddip: Okddip, tmp_path: Path, by_id: bool) -> None:
    tracking = "mlflow" if by_id else "none"
    assert okddip(*SMALL, f"tracking={tracking}", "hydra.run.dir=run").code == 0
    reference = "run"
    if by_id:
        reference = f"runs:/{json.loads((tmp_path / 'run' / 'run.json').read_text())['tracking_id']}"
    longer = lengthened(SMALL)
    answer = okddip(*longer, f"tracking={tracking}", f"trainer.resume={reference}")
    assert answer.code == 0, answer.err
    assert checkpoint.load(tmp_path / "run" / "last.pt")["epoch"] == 5
    if by_id:
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        run = client.get_run(reference.removeprefix("runs:/"))
        assert run.data.params["trainer.epochs"] == "4"
        assert run.data.tags["resumed.trainer.epochs"] == "6"
        assert len(client.get_metric_history(run.info.run_id, "test/top1")) == 6


def test_a_longer_run_that_was_cut_off_is_found_again(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert okddip(*SMALL, "tracking=none", "hydra.run.dir=runs/run").code == 0
    longer = [*lengthened(SMALL), "tracking=none"]
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=5)
        assert okddip(*longer, "trainer.resume=runs/run", "hydra.run.dir=runs/second").code == 1
    answer = okddip(*longer, "trainer.resume=auto", "hydra.run.dir=runs/third")
    assert "resumes after epoch 5" in answer.out
    assert checkpoint.load(tmp_path / "runs" / "run" / "last.pt")["epoch"] == 5


def test_a_loss_that_is_not_finite_in_an_evaluation_leaves_no_checkpoint(
    okddip: Okddip, tmp_path: Path
) -> None:
    small = ("dataset=digits", "model=resnet8", "method=baseline", "trainer.epochs=1", "tracking=none")
    answer = okddip(*small, "trainer.limit_batches=1", "optimizer.lr=1e30", "hydra.run.dir=run")
    assert answer.code == 1
    assert "Epoch 1: loss, hard_loss is not finite" in answer.err
    assert not (tmp_path / "run" / "last.pt").exists()


def test_an_epoch_that_ruins_the_weights_leaves_no_checkpoint_without_an_evaluation_too(
    okddip: Okddip, tmp_path: Path
) -> None:
    small = ("dataset=digits", "model=resnet8", "method=baseline", "tracking=none", "hydra.run.dir=run")
    answer = okddip(
        *small,
        *("trainer.epochs=8", "trainer.limit_batches=1", "trainer.eval_every=8", "optimizer.lr=0.01"),
        *("scheduler.milestones=[2]", "scheduler.gamma=1e38"),
    )
    assert answer.code == 1
    assert "Epoch 3: loss, hard_loss is not finite" in answer.err
    assert checkpoint.load(tmp_path / "run" / "last.pt")["epoch"] == 1


@pytest.mark.parametrize(
    ("other", "words"), [("pixels", "train, test differ"), ("classes", "with classes 'cat', 'dog'; here")]
)
def test_a_run_does_not_go_on_with_other_images(
    okddip: Okddip, tmp_path: Path, other: str, words: str
) -> None:
    folders_of_images(tmp_path / "first", "cat", "dog", seed=0)
    folders_of_images(tmp_path / "pixels", "cat", "dog", seed=1)
    folders_of_images(tmp_path / "classes", "dog", "zebra", seed=0)
    small = ("dataset=image_folder", "model=resnet8", "method=baseline", "trainer.batch_size=8")
    small = (*small, "tracking=none", "hydra.run.dir=run")
    assert okddip(*small, "dataset.root=first", "trainer.epochs=1").code == 0
    answer = okddip(*small, f"dataset.root={other}", "trainer.epochs=2", "trainer.resume=run")
    assert answer.code == 1
    assert words in answer.err
    (tmp_path / "first").rename(tmp_path / "moved")
    answer = okddip(*small, "dataset.root=moved", "trainer.epochs=2", "trainer.resume=run")
    assert "resumes after epoch 1" in answer.out


@pytest.mark.parametrize("value", ["5", "true", "[]"])
def test_a_reference_that_is_no_text_is_refused_by_name(okddip: Okddip, value: str) -> None:
    answer = okddip(*BARE, f"trainer.resume={value}")
    assert answer.code == 1
    assert ": must be null, auto, a path or runs:/ID." in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("value", ["2.5", "null"])
def test_a_length_that_is_no_number_is_refused_by_name(okddip: Okddip, value: str) -> None:
    assert okddip(*BARE, "hydra.run.dir=run", "trainer.epochs=1").code == 0
    answer = okddip(*BARE, f"trainer.epochs={value}", "trainer.resume=run")
    assert answer.code == 1
    assert ": must be a whole number at least 1" in answer.err
    assert "Traceback" not in answer.err


def test_a_run_that_began_without_tracking_goes_on_with_it(okddip: Okddip, tmp_path: Path) -> None:
    assert okddip(*SMALL, "tracking=none", "hydra.run.dir=run").code == 0
    answer = okddip(*SMALL, "hydra.run.dir=run", "trainer.resume=auto")
    assert answer.code == 0, answer.err
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("okddip").experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "test/top1")) == 4


def test_a_run_that_still_runs_is_not_taken_up(okddip: Okddip, tmp_path: Path) -> None:
    from okddip.run.folder import RunFolder

    assert okddip(*SMALL, "tracking=none", "hydra.run.dir=run").code == 0
    with RunFolder(tmp_path / "run").lock():
        answer = okddip(*SMALL, "tracking=none", "hydra.run.dir=run", "trainer.resume=auto")
    assert answer.code == 1
    assert "still running in another process" in answer.err


@pytest.mark.parametrize(
    ("job", "count"),
    [("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")],
)
def test_what_is_started_again_goes_on_with_the_run_that_it_began(
    okddip: Okddip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: str, count: str
) -> None:
    assert okddip(*BARE, "trainer.epochs=1", "hydra.run.dir=elsewhere").code == 0
    (tmp_path / "elsewhere" / "run.json").unlink()
    command = (*BARE, "trainer.epochs=3")
    from_copy = (*command, "trainer.resume=elsewhere/last.pt")
    monkeypatch.setenv(job, "7")
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=2)
        assert "resumes after epoch 1" in okddip(*from_copy, "hydra.run.dir=runs/first").out
    monkeypatch.setenv(count, "1")
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=2)
        assert "resumes after epoch 2" in okddip(*from_copy, "hydra.run.dir=runs/second").out
        assert "resumes after epoch 2" in okddip(*command, "hydra.run.dir=runs/third").out
    monkeypatch.setenv(
        job, "8"
    )  # it was cut off before it began a run; the same run of another is not its own
    cut_off(monkeypatch, epoch=0)
    answer = okddip(*command, "hydra.run.dir=runs/fourth")
    assert "goes on" not in answer.out
    assert "the power went" in answer.err
    assert [path.parent.name for path in tmp_path.glob("runs/*/last.pt")] == ["first"]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose tables exist; creating them takes seconds."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MLflow(f"sqlite:///{file}", "first").open()
    return file


@pytest.fixture
def client(empty_store: Path, tmp_path: Path) -> mlflow.MlflowClient:
    """Of the store that runs of this test write to."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")


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
    assert [line["epoch"] for line in lines] == list(range(epochs))
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


def test_an_epoch_whose_checkpoint_was_damaged_is_not_told_of_twice(
    okddip: Okddip, tmp_path: Path, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert okddip(*BARE, "hydra.run.dir=whole/run").code == 0
    folder = tmp_path / "runs" / "run"
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=3)
        assert okddip(*TINY, "hydra.run.dir=runs/run").code == 1
    before = (folder / "metrics.jsonl").read_text()
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:-1000])
    with monkeypatch.context() as patch:  # and once more, now with a whole checkpoint of the epoch before
        cut_off(patch, epoch=2)
        assert okddip(*TINY, "hydra.run.dir=runs/run", "trainer.resume=auto").code == 1
    answer = okddip(*TINY, "hydra.run.dir=runs/run", "trainer.resume=auto")
    assert "resumes after epoch 2" in answer.out
    assert (folder / "metrics.jsonl").read_text().startswith(before)
    assert_told_once(client, folder)
    assert are_the_same(weights(tmp_path / "whole" / "run"), weights(folder))


@pytest.mark.parametrize("left", ["", '{"epoch": 1, "timestamp_ms": 1, "tra', "\0\0\0\0"])
def test_a_lost_line_comes_back_from_the_checkpoint(
    okddip: Okddip,
    tmp_path: Path,
    client: mlflow.MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    left: str,
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=2)
        assert okddip(*TINY, "hydra.run.dir=run").code == 1
    first, second = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(first + left)
    assert okddip(*TINY, "hydra.run.dir=run", "trainer.resume=auto").code == 0
    assert (folder / "metrics.jsonl").read_text().startswith(first + second)
    assert_told_once(client, folder)


def test_a_finished_run_of_mlflow_is_taken_up_without_its_folder(
    okddip: Okddip, tmp_path: Path, client: mlflow.MlflowClient
) -> None:
    assert okddip(*TINY, "hydra.run.dir=runs/run").code == 0
    shutil.rmtree(tmp_path / "runs")
    reference = f"trainer.resume=runs:/{the_run(client).info.run_id}"
    answer = okddip(*TINY, reference, "hydra.run.dir=elsewhere")
    assert answer.code == 0, answer.err
    assert "is finished after epoch 4" in answer.out
    assert "student *" in answer.out
    assert_told_once(client, tmp_path / "elsewhere")

    longer = lengthened(TINY)
    assert okddip(*longer, reference).code == 0  # by now its folder is here again
    assert_told_once(client, tmp_path / "elsewhere", epochs=6)


def test_a_copied_checkpoint_goes_on_as_a_new_run_with_its_history(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert okddip(*BARE, "hydra.run.dir=runs/run").code == 0
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=2)
        assert okddip(*BARE, "hydra.run.dir=runs/cut").code == 1
    (tmp_path / "usb").mkdir()
    for name in ("last.pt", "best.pt", "metrics.jsonl"):
        shutil.copy(tmp_path / "runs" / "cut" / name, tmp_path / "usb" / name)
    answer = okddip(*BARE, "hydra.run.dir=runs/copy", "trainer.resume=usb/last.pt")
    assert answer.code == 0, answer.err
    assert "resumes after epoch 2" in answer.out
    assert are_the_same(weights(tmp_path / "runs" / "run"), weights(tmp_path / "runs" / "copy"))
    assert lines_of(tmp_path / "runs" / "copy")[:2] == lines_of(tmp_path / "usb")
    assert len(lines_of(tmp_path / "runs" / "copy")) == 4
    assert (tmp_path / "runs" / "copy" / "best.pt").exists()

    shutil.copy(tmp_path / "runs" / "run" / "last.pt", tmp_path / "alone.pt")
    answer = okddip(*BARE, "hydra.run.dir=runs/alone", "trainer.resume=alone.pt")
    assert answer.code == 0, answer.err
    assert "is finished after epoch 4" in answer.out
    assert lines_of(tmp_path / "runs" / "alone") == lines_of(tmp_path / "runs" / "run")[3:]


@pytest.mark.parametrize("name", ["best.pt", "previous.pt"])
def test_a_run_goes_on_from_its_last_epoch_alone(okddip: Okddip, client: object, name: str) -> None:
    assert okddip(*TINY, "hydra.run.dir=run").code == 0
    for run in ("run", f"runs:/{json.loads(Path('run/run.json').read_text())['tracking_id']}"):
        answer = okddip(*TINY, f"trainer.resume={run}/{name}")
        assert answer.code == 1
        assert f"trainer.resume={run}/{name}: a run is resumed from its last epoch" in answer.err
        assert f"Give trainer.resume={run} " in answer.err


def test_a_run_is_not_trained_over_another(okddip: Okddip, tmp_path: Path) -> None:
    assert okddip(*BARE, "hydra.run.dir=run").code == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    for overrides in ([], ["seed=1"], ["seed=1", "trainer.resume=auto"]):
        answer = okddip(*BARE, "hydra.run.dir=run", *overrides)
        assert answer.code == 1
        assert "there is a run in this folder already" in answer.err
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


@pytest.mark.parametrize("text", [b"", b'{"identity": "58c', b"[]", b"\xff\xfe", b"\0" * 50])
def test_a_damaged_note_of_another_run_is_passed_over(okddip: Okddip, tmp_path: Path, text: bytes) -> None:
    (tmp_path / "runs" / "other").mkdir(parents=True)
    (tmp_path / "runs" / "other" / "run.json").write_bytes(text)
    answer = okddip(*BARE, "trainer.epochs=1", "hydra.run.dir=runs/run", "trainer.resume=auto")
    assert answer.code == 0, answer.err
    assert f"{tmp_path}/runs/other/run.json: cannot be read" in answer.out
    assert "a new one" in answer.out


@pytest.mark.parametrize("reference", ["auto", "runs/run", "runs/run/last.pt"])
def test_a_run_whose_note_is_damaged_is_known_by_its_checkpoint(
    okddip: Okddip,
    tmp_path: Path,
    client: mlflow.MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    reference: str,
) -> None:
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=2)
        assert okddip(*TINY, "hydra.run.dir=runs/run").code == 1
    (tmp_path / "runs" / "run" / "run.json").write_text('{"identity": ')
    answer = okddip(*TINY, "hydra.run.dir=runs/again", f"trainer.resume={reference}")
    assert answer.code == 0, answer.err
    assert "resumes after epoch 2" in answer.out
    assert_told_once(client, tmp_path / "runs" / "run")


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("scheduler.milestones=[0.5]", "learning rate"),
        ("scheduler=cosine", "learning rate"),
        ("scheduler.warmup_epochs=0.5", "learning rate"),
        ("method.ramp_epochs=0.5", "ramp"),
    ],
)
def test_a_run_whose_finished_epochs_depend_on_its_length_is_not_lengthened(
    okddip: Okddip, tmp_path: Path, override: str, what: str
) -> None:
    command = (*SMALL, "tracking=none", f"method={'one' if what == 'ramp' else 'baseline'}", override)
    assert okddip(*command, "hydra.run.dir=runs/run").code == 0
    shutil.copy(tmp_path / "runs/run/last.pt", tmp_path / "copy.pt")
    before = {path.name: path.read_bytes() for path in (tmp_path / "runs" / "run").glob("*.pt")}
    for reference in ("runs/run", "copy.pt"):
        answer = okddip(*lengthened(command), f"trainer.resume={reference}", "hydra.run.dir=runs/new")
        assert answer.code == 1
        assert f"was begun with trainer.epochs=4, which sets its {what}, so" in answer.err
        assert "Traceback" not in answer.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "runs" / "run").glob("*.pt")} == before
    assert not (tmp_path / "runs" / "new" / "run.json").exists()
    answer = okddip(*command, "trainer.resume=auto", "hydra.run.dir=runs/unused")  # it is still what it was
    assert "is finished after epoch 4" in answer.out


def test_a_run_is_lengthened_while_its_finished_epochs_are_those_of_the_longer_run(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*BARE, "scheduler.milestones=[0.5]")
    assert okddip(*lengthened(command), "hydra.run.dir=whole/run").code == 0
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=1)
        assert okddip(*command, "hydra.run.dir=runs/run").code == 1
    answer = okddip(*lengthened(command), "trainer.resume=runs/run")
    assert answer.code == 0, answer.err
    assert are_the_same(weights(tmp_path / "whole" / "run"), weights(tmp_path / "runs" / "run"))


def test_a_run_that_an_older_version_lengthened_is_evaluated_and_not_resumed(
    okddip: Okddip, tmp_path: Path
) -> None:
    assert okddip(*BARE, "hydra.run.dir=runs/run").code == 0
    state = checkpoint.load(tmp_path / "runs" / "run" / "last.pt")
    torch.save(state | {"lengths": [2]}, tmp_path / "runs" / "run" / "last.pt")
    answer = okddip(*BARE, "trainer.resume=runs/run")
    assert answer.code == 1
    assert "lengthened this run, although its learning rate or ramp depend on its length" in answer.err
    assert okddip("task=evaluate", "checkpoint=runs/run", "tracking=none").code == 0


def test_a_run_that_was_made_longer_is_no_more_the_shorter_one(okddip: Okddip, tmp_path: Path) -> None:
    longer = lengthened(BARE)
    assert okddip(*BARE, "hydra.run.dir=runs/run").code == 0
    assert okddip(*longer, "hydra.run.dir=runs/unused", "trainer.resume=runs/run").code == 0
    assert "is finished" in okddip(*longer, "hydra.run.dir=runs/unused", "trainer.resume=auto").out
    assert "a new one" in okddip(*BARE, "hydra.run.dir=runs/short", "trainer.resume=auto").out
    assert checkpoint.load(tmp_path / "runs" / "run" / "last.pt")["epoch"] == 5
    answer = okddip(*BARE, "trainer.resume=runs/run")
    assert answer.code == 1
    assert "trainer.epochs: 6 there, 4 here" in answer.err


def test_a_note_that_claims_another_run_is_not_believed(okddip: Okddip, tmp_path: Path) -> None:
    assert okddip(*BARE, "hydra.run.dir=runs/one").code == 0
    assert okddip(*BARE, "seed=1", "hydra.run.dir=runs/two").code == 0
    shutil.copy(tmp_path / "runs/two/last.pt", tmp_path / "runs/one/last.pt")
    answer = okddip(*BARE, "hydra.run.dir=runs/three", "trainer.resume=auto")
    assert answer.code == 1
    assert "seed: 1 there, 0 here" in answer.err


FOREIGN: dict[str, Any] = {
    "a tensor": torch.zeros(3),
    "a list": [1, 2],
    "a state_dict": {"conv.weight": torch.zeros(3, 3)},
    "another program's": {"model": {}, "optimizer": {}, "epoch": 3, "config": {"lr": 0.1}, "group": "a"},
    "an odd config": {"config": {"trainer": 3, "method": "${nowhere}"}, "group": {}, "method": {}},
}


@pytest.mark.parametrize("kind", [*FOREIGN, "lacks the optimizer", "other weights", "other moments"])
def test_a_foreign_checkpoint_is_refused_by_name(okddip: Okddip, tmp_path: Path, kind: str) -> None:
    if kind in FOREIGN:
        state = FOREIGN[kind]
    else:
        assert okddip(*BARE, "trainer.epochs=1", "hydra.run.dir=run").code == 0
        state = checkpoint.load(tmp_path / "run" / "last.pt")
        if kind == "lacks the optimizer":
            del state["optimizer"]
        elif kind == "other weights":
            state["group"] = {f"old.{name}": value for name, value in state["group"].items()}
        else:
            del state["optimizer"]["param_groups"][0]["params"][0]
    torch.save(state, tmp_path / "foreign.pt")
    overrides = [part.replace("epochs=4", "epochs=2") for part in BARE]
    overrides = [*overrides, "trainer.epochs=2"] if kind not in FOREIGN else overrides
    answers = [okddip(*overrides, "trainer.resume=foreign.pt", "hydra.run.dir=new")]
    if kind in FOREIGN or kind == "other weights":
        answers.append(okddip("task=evaluate", "checkpoint=foreign.pt", "tracking=none"))
    for answer in answers:
        assert answer.code == 1
        assert "Traceback" not in answer.err
        message = (
            "does not fit" if kind.startswith("other ") else f"{tmp_path}/foreign.pt: is not a checkpoint"
        )
        assert message.replace(f"{tmp_path}/", "") in answer.err.replace(f"{tmp_path}/", ""), answer.err


def test_a_store_that_was_deleted_in_between_is_told_everything_again(
    okddip: Okddip,
    tmp_path: Path,
    client: mlflow.MlflowClient,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=2)
        assert okddip(*TINY, "hydra.run.dir=run").code == 1
    first = the_run(client).info.run_id
    shutil.copy(empty_store, tmp_path / "new.db")
    answer = okddip(*TINY, "hydra.run.dir=run", "trainer.resume=run", "tracking.uri=sqlite:///new.db")
    assert answer.code == 1
    assert f"MLflow run {first}: cannot be resumed in tracking.uri=sqlite:///new.db" in answer.err
    assert f"begun in tracking.uri=sqlite:///{tmp_path}/mlflow.db" in answer.err

    note = tmp_path / "run" / "run.json"  # as if it had been begun in the store that lacks it now
    note.write_text(note.read_text().replace("mlflow.db", "new.db"))
    answer = okddip(*TINY, "hydra.run.dir=run", "trainer.resume=auto", "tracking.uri=sqlite:///new.db")
    assert answer.code == 0, answer.err
    assert f"MLflow run {first} is not, or no longer, in" in answer.out
    assert_told_once(mlflow.MlflowClient(f"sqlite:///{tmp_path}/new.db"), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        "okddip.data.dataset.Dataset.train_loader",
        "okddip.main.make",
        "okddip.tracking.tracker.MLflow._create_run",
        "okddip.tracking.outbox.Outbox.add",
        "okddip.training.checkpoint.link",
        "okddip.training.trainer.append_line",
        "okddip.tracking.tracker.MLflow.log_artifact",
        "okddip.tracking.tracker.MLflow.finish",
        "okddip.training.trainer.metrics.read",
    ],
)
def test_a_signal_at_any_moment_is_answered_and_costs_nothing(
    okddip: Okddip, tmp_path: Path, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    original = pydoc.locate(moment)
    assert callable(original)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(moment, original)
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    monkeypatch.setattr(moment, interrupted)
    answer = okddip(*TINY, "hydra.run.dir=run")
    assert answer.code == 143, answer.err
    expected = shlex.join(["okddip", *TINY, "hydra.run.dir=run", "trainer.resume=auto"])
    assert answer.out.splitlines()[-1] == f"Stopped. Resume with: {expected}"
    if client.get_experiment_by_name("okddip"):
        experiment = client.get_experiment_by_name("okddip").experiment_id
        assert {run.info.status for run in client.search_runs([experiment])} <= {"KILLED"}
    assert okddip(*TINY, "hydra.run.dir=run", "trainer.resume=auto").code == 0
    assert_told_once(client, tmp_path / "run")


def test_an_evaluation_is_stopped_by_a_signal_too(
    okddip: Okddip, tmp_path: Path, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert okddip(*BARE, "hydra.run.dir=run").code == 0
    monkeypatch.setattr("okddip.tasks.evaluate.task.measure", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert okddip("task=evaluate", "checkpoint=run").code == 143
    assert the_run(client).info.status == "KILLED"


def test_an_exception_after_a_signal_marks_the_run_killed(
    okddip: Okddip, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worker_gone(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            raise RuntimeError("DataLoader worker exited unexpectedly")

    monkeypatch.setattr(Trainer, "train_epoch", worker_gone)
    answer = okddip(*TINY, "hydra.run.dir=run")
    assert answer.code == 143
    assert "Stopped. Resume with: " in answer.out
    assert the_run(client).info.status == "KILLED"


def test_a_folder_that_goes_away_is_named_and_the_run_goes_on_when_it_is_back(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert okddip(*BARE, "hydra.run.dir=whole/run").code == 0
    with monkeypatch.context() as patch:
        whole = Trainer.train_epoch

        def unplug(self: Trainer, *arguments: Any) -> Any:
            if arguments[-1] == 2:
                (tmp_path / "runs" / "run").rename(tmp_path / "unplugged")
            return whole(self, *arguments)

        patch.setattr(Trainer, "train_epoch", unplug)
        answer = okddip(*BARE, "hydra.run.dir=runs/run")
    assert answer.code == 1
    assert f"{tmp_path}/runs/run/last.pt: cannot be written (No such file or directory)" in answer.err
    (tmp_path / "unplugged").rename(tmp_path / "runs" / "run")
    assert okddip(*BARE, "hydra.run.dir=runs/run", "trainer.resume=auto").code == 0
    assert are_the_same(weights(tmp_path / "whole" / "run"), weights(tmp_path / "runs" / "run"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "name",
    [
        "last.pt",
        pytest.param("metrics.jsonl", marks=pytest.mark.slow),
        pytest.param("run.json", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_named_and_costs_nothing(
    okddip: Okddip, tmp_path: Path, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert okddip(*BARE, "hydra.run.dir=whole/run").code == 0
    folder = tmp_path / "run"
    victim = {"last.pt": "last.new", "metrics.jsonl": "metrics.jsonl", "run.json": "run.json.new"}[name]
    kept = tmp_path / "kept"
    with monkeypatch.context() as patch:
        whole = Trainer.train_epoch if name != "run.json" else MLflow._create_run

        def fill(*arguments: Any) -> Any:
            if name == "run.json" or arguments[-1] == 2:
                if (folder / victim).exists():
                    (folder / victim).rename(kept)
                (folder / victim).symlink_to("/dev/full")
            return whole(*arguments)

        patch.setattr(*((MLflow, "_create_run") if name == "run.json" else (Trainer, "train_epoch")), fill)
        answer = okddip(*TINY, "hydra.run.dir=run")
    assert answer.code == 1
    assert f"{folder}/{name}: cannot be written (No space left on device)" in answer.err
    (folder / victim).unlink(missing_ok=True)
    if kept.exists():
        kept.rename(folder / victim)
    answer = okddip(*TINY, "hydra.run.dir=run", "trainer.resume=auto")
    assert answer.code == 0, answer.err
    assert_told_once(client, folder)
    assert are_the_same(weights(tmp_path / "whole" / "run"), weights(folder))


def test_a_streamed_data_set_goes_on_where_it_was_cut_off(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_folders(tmp_path / "images")
    command = [*STREAMED, "tracking=none", "trainer.epochs=3"]
    assert okddip(*command, "dataset.workers=2", "hydra.run.dir=whole/run").code == 0
    with monkeypatch.context() as patch:
        cut_off(patch, epoch=1)
        assert okddip(*command, "dataset.workers=2", "hydra.run.dir=runs/run").code == 1
    answer = okddip(*command, "dataset.workers=2", "hydra.run.dir=runs/run", "trainer.resume=auto")
    assert "resumes after epoch 1" in answer.out
    assert are_the_same(weights(tmp_path / "whole" / "run"), weights(tmp_path / "runs" / "run"))


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "okddip.main", *overrides]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group of its own, as of a job or a terminal
        # a shell lets its background jobs ignore Ctrl-C, and so would the run if the tests are such a job
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_ends_a_run_with_workers_as_killed(
    tmp_path: Path, client: mlflow.MlflowClient, number: signal.Signals
) -> None:
    draw_folders(tmp_path / "images")
    process = start(tmp_path, *STREAMED, "dataset.workers=2", "trainer.epochs=10000", "hydra.run.dir=run")
    wait_for(tmp_path, "run/previous.pt", process)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert output.strip().splitlines()[-1].startswith("Stopped. Resume with: okddip dataset=imagenet")
    assert "Traceback" not in output
    assert the_run(client).info.status == "KILLED"


SIGNAL_WHILE_WORKERS_START = """
import os
import signal
from okddip.main import cli

os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
cli()
"""


@pytest.mark.slow
def test_a_signal_while_workers_start_ends_the_run_and_is_not_lost_in_a_hook(tmp_path: Path) -> None:
    draw_folders(tmp_path / "images")
    process = subprocess.run(
        [sys.executable, "-c", SIGNAL_WHILE_WORKERS_START, *STREAMED, "dataset.workers=2"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert process.returncode == 143, process.stdout
    assert "Stopped. Resume with: " in process.stdout.strip().splitlines()[-1]
    assert "Traceback" not in process.stdout


def arguments_of(process: Path) -> list[bytes]:
    try:
        return (process / "cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return []


@pytest.mark.slow
def test_a_job_that_submitit_preempts_is_requeued_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    small = [part.replace("epochs=4", "epochs=12") for part in BARE]
    sweep = start(tmp_path, "-m", "hydra/launcher=submitit_local", *small, "seed=0")
    wait_for(tmp_path, "multirun/*/*/last.pt", sweep)
    [job] = [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if b"submitit.core._submit" in arguments_of(process) and os.getpgid(int(process.name)) == sweep.pid
    ]
    os.kill(job, signal.SIGUSR2)
    output, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, output
    [log] = [path.read_text() for path in tmp_path.glob("multirun/*/.submitit/*/*_0_log.out")]
    assert "Requeued job" in log
    assert "resumes after epoch" in log
    [folder] = {path.parent for path in tmp_path.glob("multirun/*/*/last.pt")}
    assert [line["epoch"] for line in lines_of(folder)] == list(range(12))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_ends_a_run_properly_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    long = [part.replace("epochs=4", "epochs=10000") for part in SMALL]
    process = start(tmp_path, *long)
    wait_for(tmp_path, "outputs/*/*/last.pt", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    expected = shlex.join(["okddip", *long, "trainer.resume=auto"])
    assert output.strip().splitlines()[-1] == f"Stopped. Resume with: {expected}"
    [last] = tmp_path.glob("outputs/*/*/last.pt")
    checkpoint.load(last)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("okddip").experiment_id])
    assert run.info.status == "KILLED"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "overrides"),
    [
        (12, ["method=okddip", "trainer.precision=bf16"]),
        (8, ["method=one", "trainer.limit_batches=2", "tracking=none"]),
    ],
)
def test_a_run_killed_many_times_at_random_moments_ends_as_if_never_killed(
    tmp_path: Path, kills: int, overrides: list[str]
) -> None:
    command = [*(part.replace("epochs=4", "epochs=60") for part in SMALL), *overrides]
    whole = start(tmp_path, *command, "hydra.run.dir=whole/run")
    whole.communicate(timeout=600)
    assert whole.returncode == 0

    moments = random.Random(0)
    killed = 0
    while killed < kills:
        process = start(tmp_path, *command, "trainer.resume=auto")
        if killed % 2:  # while epochs pass and checkpoints are written; else anywhere, start-up included
            wait_for(tmp_path, "outputs/*/*/last.pt", process)
            lines = [path.stat().st_mtime_ns for path in tmp_path.glob("outputs/*/*/metrics.jsonl")]
            while process.poll() is None and lines == [
                path.stat().st_mtime_ns for path in tmp_path.glob("outputs/*/*/metrics.jsonl")
            ]:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.1))
        else:
            time.sleep(moments.uniform(0.5, 8))
        assert process.poll() is None, "finished before it could be killed: make the run longer"
        process.kill()
        process.communicate()
        killed += 1
    last = start(tmp_path, *command, "trainer.resume=auto")
    output, _ = last.communicate(timeout=600)
    assert last.returncode == 0, output
    [folder] = {path.parent for path in tmp_path.glob("outputs/*/*/last.pt")}
    assert are_the_same(weights(tmp_path / "whole" / "run"), weights(folder))
    lines = [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(60))
    if "tracking=none" not in overrides:
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        run_id = json.loads((folder / "run.json").read_text())["tracking_id"]
        assert client.get_run(run_id).info.status == "FINISHED"
        logged = client.get_metric_history(run_id, "test/top1")
        assert sorted(metric.step for metric in logged) == list(range(60))
