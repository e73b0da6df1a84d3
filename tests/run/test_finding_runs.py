"""Which run a command resumes, and which it leaves alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from conftest import folders_of_images, quick_first
from omegaconf import DictConfig
from run_helpers import (
    BARE,
    SMALL,
    TINY,
    Okddip,
    assert_told_once,
    cut_off,
    lengthened,
    the_run,
)

from okddip.run.identity import run_identity
from okddip.training import checkpoint


def test_a_finished_run_is_not_trained_again(okddip: Okddip, tmp_path: Path) -> None:
    assert okddip(*SMALL, "tracking=none").code == 0
    [folder] = (tmp_path / "outputs").glob("*/*")
    before = (folder / "last.pt").read_bytes()
    answer = okddip(*SMALL, "tracking=none", "trainer.resume=auto")
    assert answer.code == 0
    assert "leader *" in answer.out
    assert (folder / "last.pt").read_bytes() == before


@pytest.mark.slow
def test_another_configuration_is_another_run(okddip: Okddip, tmp_path: Path) -> None:
    assert okddip(*SMALL, "tracking=none").code == 0
    answer = okddip(*SMALL, "tracking=none", "optimizer.momentum=0.8", "trainer.resume=auto")
    assert "A new run: " in answer.out
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


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("pixels", "train, test differ"),
        pytest.param("classes", "with classes 'cat', 'dog'; here", marks=pytest.mark.slow),
    ],
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
def test_a_reference_is_a_path_as_it_was_typed(okddip: Okddip, tmp_path: Path, value: str) -> None:
    answer = okddip(*BARE, f"trainer.resume={value}")
    assert answer.code == 1
    assert f"trainer.resume={tmp_path}/{value}: there is no such checkpoint." in answer.err
    assert "Traceback" not in answer.err


def test_a_run_that_still_runs_is_not_taken_up(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from okddip.run import folder
    from okddip.run.folder import RunFolder

    monkeypatch.setattr(folder, "LOCK_SECONDS", 0.1)
    assert okddip(*SMALL, "tracking=none", "hydra.run.dir=run").code == 0
    with RunFolder(tmp_path / "run").lock():
        answer = okddip(*SMALL, "tracking=none", "hydra.run.dir=run", "trainer.resume=auto")
    assert answer.code == 1
    assert "still running in another process" in answer.err


@pytest.mark.parametrize(
    ("job", "count"),
    [
        ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
        pytest.param("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", marks=pytest.mark.slow),
    ],
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    files = [tmp_path / "run" / "last.pt", *(tmp_path / "run" / ".hydra").iterdir()]
    before = [file.read_bytes() for file in files]
    for overrides in ([], ["seed=1"], ["seed=1", "trainer.resume=auto"]):
        answer = okddip(*BARE, "hydra.run.dir=run", *overrides)
        assert answer.code == 1
        assert "there is a run in this folder already" in answer.err
        assert [file.read_bytes() for file in files] == before
    assert len(before) == 4


@pytest.mark.parametrize("text", quick_first(b'{"identity": "58c', b"", b"[]", b"\xff\xfe", b"\0" * 50))
def test_a_damaged_note_of_another_run_is_passed_over(okddip: Okddip, tmp_path: Path, text: bytes) -> None:
    (tmp_path / "runs" / "other").mkdir(parents=True)
    (tmp_path / "runs" / "other" / "run.json").write_bytes(text)
    answer = okddip(*BARE, "trainer.epochs=1", "hydra.run.dir=runs/run", "trainer.resume=auto")
    assert answer.code == 0, answer.err
    assert f"{tmp_path}/runs/other/run.json: cannot be read" in answer.out
    assert "A new run: " in answer.out


@pytest.mark.parametrize("reference", quick_first("auto", "runs/run", "runs/run/last.pt"))
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


@pytest.mark.slow
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
