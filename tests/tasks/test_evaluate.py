"""Task evaluate: the numbers of the run, and more of them."""

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from conftest import Answer, quick_first
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from okddip.data.sources import digits
from okddip.tasks.evaluate.measure import class_accuracy, count_confusion
from okddip.tasks.evaluate.results import draw_confusion
from okddip.tasks.evaluate.settings import evaluation_settings
from okddip.training import checkpoint

Okddip = Callable[..., Answer]
SMALL = ("dataset=digits", "model=resnet8", "dataset.train_size=320", "trainer.epochs=2")
EVALUATE = ("task=evaluate", "hydra.run.dir=evaluation")


def train(okddip: Okddip, *overrides: str, folder: str = "run") -> dict[str, Any]:
    answer = okddip(*SMALL, *overrides, f"hydra.run.dir={folder}")
    assert answer.code == 0, answer.err
    return checkpoint.load(Path(folder, "last.pt"))


def report() -> dict[str, Any]:
    return json.loads(Path("evaluation/evaluation.json").read_text())


def write_digits(folder: Path, classes: list[str]) -> None:
    """The digits as an image folder."""
    for split, (images, labels) in zip(("train", "test"), digits()[:2], strict=True):
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = folder / split / classes[label] / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0].numpy()).save(file)


@pytest.mark.parametrize("method", quick_first("okddip", "one", "independent"))
def test_the_numbers_are_those_of_the_run(okddip: Okddip, method: str) -> None:
    state = train(okddip, f"method={method}", "tracking=none")
    answer = okddip(*EVALUATE, "checkpoint=run/last.pt", "tracking=none")
    assert answer.code == 0, answer.err
    measured = report()["metrics"]
    reported = {
        name.removeprefix("test/"): value
        for name, value in state["metrics"].items()
        if name.startswith("test/")
    }
    assert {name: measured[name] for name in reported} == reported
    more = {name.partition("/")[0] for name in measured.keys() - reported.keys()}
    assert more == {name.partition("/")[0] for name in reported if name.endswith("/top1")} - {"mean"}


def test_a_compiled_run_is_measured_without_a_compiler(configured: Callable[..., DictConfig]) -> None:
    state = {"config": OmegaConf.to_container(configured("trainer.compile=true"), resolve=True)}
    assert not evaluation_settings(configured(), set(), state).trainer.compile


@pytest.mark.slow
def test_a_teacher_takes_part_and_may_have_moved(okddip: Okddip) -> None:
    train(okddip, "method=baseline", "tracking=none", folder="teacher")
    state = train(okddip, "method=kd", "method.teacher=teacher", "tracking=none")
    Path("teacher").rename("moved")
    command = (*EVALUATE, "checkpoint=run", "tracking=none")
    answer = okddip(*command)
    assert answer.code == 1
    assert "method.teacher=teacher: there is no such checkpoint" in answer.err
    answer = okddip(*command, "methods.teacher=moved")
    assert answer.code == 0, answer.err
    for name in ("loss", "soft_loss", "student/top1", "teacher/top1"):
        assert report()["metrics"][name] == state["metrics"][f"test/{name}"]


@pytest.mark.slow
def test_a_teacher_meets_another_data_set_normalised_as_its_own(okddip: Okddip, tmp_path: Path) -> None:
    train(okddip, "method=baseline", "tracking=none", folder="teacher")
    state = train(okddip, "method=kd", "method.teacher=teacher", "tracking=none")
    write_digits(tmp_path / "same", [str(digit) for digit in range(10)])
    for image in (tmp_path / "same" / "train").glob("*/*"):  # so that its own statistics are others
        Image.new("L", (16, 16), 20 * int(image.parent.name)).save(image)
    answer = okddip(
        *(*EVALUATE, "checkpoint=run", "tracking=none", "dataset=image_folder"),
        *("dataset.root=same", "dataset.source.channels=1"),
    )
    assert answer.code == 0, answer.err
    for name in ("student/top1", "teacher/top1"):
        assert report()["metrics"][name] == state["metrics"][f"test/{name}"]


@pytest.mark.slow
def test_a_teacher_that_the_program_chose_is_found_and_never_trained(okddip: Okddip) -> None:
    state = train(okddip, "method=kd", "methods.teacher=auto", "methods.teacher_model=resnet8")
    answer = okddip(*EVALUATE, "checkpoint=run")
    assert answer.code == 0, answer.err
    assert report()["metrics"]["teacher/top1"] == state["metrics"]["test/teacher/top1"]
    answer = okddip(*EVALUATE, "checkpoint=run", "tracking.experiment=another")
    assert answer.code == 0, answer.err
    answer = okddip(*EVALUATE, "checkpoint=run", "tracking.uri=sqlite:///another.db")
    assert answer.code == 1
    assert "method.teacher=auto: the store that tracking names has no finished run" in answer.err


def test_a_run_of_mlflow_is_measured_into_a_run_of_mlflow(okddip: Okddip, tmp_path: Path) -> None:
    state = train(okddip)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("okddip").experiment_id
    [run] = client.search_runs([experiment])
    answer = okddip(*EVALUATE, f"checkpoint=runs:/{run.info.run_id}/best.pt")
    assert answer.code == 0, answer.err
    assert "leader *" in answer.out
    assert "data set   digits, 359 test images" in answer.out
    [evaluation] = client.search_runs([experiment], "tags.kind = 'evaluation'")
    assert evaluation.info.status == "FINISHED"
    assert evaluation.data.params["model.depth"] == "8"
    best = state["history"]["best"]
    assert evaluation.data.metrics["test/leader/top1"] == best["test/leader/top1"]
    assert evaluation.data.metrics["test/leader/ece"] == report()["metrics"]["leader/ece"]
    artifacts = {file.path for file in client.list_artifacts(evaluation.info.run_id)}
    assert {"evaluation.json", "confusion.png", "confusion.pdf"} <= artifacts


def test_classes_and_confusion_add_up_to_the_accuracy(okddip: Okddip) -> None:
    state = train(okddip, "tracking=none")
    assert okddip(*EVALUATE, "checkpoint=run", "tracking=none").code == 0
    counts = torch.tensor(report()["confusion"]["counts"])
    assert report()["confusion"]["predictor"] == "leader"
    assert counts.sum() == report()["images"] == 359
    assert counts.sum(1).equal(digits().test.labels.bincount())
    assert 100 * counts.trace().item() / 359 == state["metrics"]["test/leader/top1"]
    assert class_accuracy(counts) == report()["class_accuracy"]["leader"]
    assert report()["class_accuracy"].keys() == {"peer0", "peer1", "peer2", "leader", "ensemble"}
    assert Image.open("evaluation/confusion.png").format == "PNG"
    assert Path("evaluation/confusion.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_another_data_set_with_the_same_classes(okddip: Okddip, tmp_path: Path) -> None:
    state = train(okddip, "method=baseline", "tracking=none")
    write_digits(tmp_path / "same", [str(digit) for digit in range(10)])
    write_digits(tmp_path / "others", ["zero", "one", "two", *map(str, range(3, 10))])
    command = (*EVALUATE, "checkpoint=run", "tracking=none", "dataset=image_folder")
    answer = okddip(*command, "dataset.root=same", "dataset.source.channels=1")
    assert answer.code == 0, answer.err
    assert report()["dataset"] == "image_folder"
    # in another order: what is counted is the same, what is summed nearly so
    assert report()["metrics"]["student/top1"] == state["metrics"]["test/top1"]
    assert report()["metrics"]["loss"] == pytest.approx(state["metrics"]["test/loss"], rel=1e-5)

    answer = okddip(*command, "dataset.root=others", "dataset.source.channels=1")
    assert answer.code == 1
    assert "dataset=image_folder: has classes ['3', '4'" in answer.err
    assert "trained on dataset=digits with classes ['0', '1'" in answer.err
    answer = okddip(*command, "dataset.root=same")
    assert answer.code == 1
    assert "has image channels 3" in answer.err
    assert "Traceback" not in answer.err


def test_a_data_set_may_have_moved(okddip: Okddip, tmp_path: Path) -> None:
    write_digits(tmp_path / "images", [str(digit) for digit in range(10)])
    options = ("dataset=image_folder", "dataset.root=images", "dataset.source.channels=1")
    state = train(okddip, "method=baseline", "tracking=none", *options)
    shutil.move("images", "moved")
    command = (*EVALUATE, "checkpoint=run", "tracking=none")
    answer = okddip(*command)
    assert answer.code == 1
    assert "dataset.root=images: there is no such folder" in answer.err
    answer = okddip(*command, "dataset.root=moved", "trainer.eval_batch_size=100")
    assert answer.code == 0, answer.err
    assert report()["metrics"]["top1"] == state["metrics"]["test/top1"]
    assert report()["metrics"]["loss"] == pytest.approx(state["metrics"]["test/loss"], rel=1e-5)


@pytest.mark.parametrize("name", quick_first("evaluation.json", "confusion.png", "confusion.pdf"))
def test_what_cannot_be_written_is_named(okddip: Okddip, name: str) -> None:
    train(okddip, "method=baseline", "tracking=none", "trainer.limit_batches=1")
    Path("evaluation", name, "in the way").mkdir(parents=True)
    answer = okddip(*EVALUATE, "checkpoint=run", "tracking=none", "trainer.limit_batches=1")
    assert answer.code == 1
    assert "evaluation: evaluation.json, confusion.png and confusion.pdf cannot be written (" in answer.err
    assert "Traceback" not in answer.err


def test_a_server_that_does_not_answer_is_named_at_once(okddip: Okddip) -> None:
    with socket.socket() as silent:  # takes connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        answer = okddip(*EVALUATE, "checkpoint=runs:/1234", f"tracking.uri={uri}")
    assert answer.code == 1
    assert f"tracking.uri={uri}: this store cannot be opened" in answer.err
    assert time.monotonic() - started < 60  # MLflow itself tries for minutes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "checkpoint: not given. Add checkpoint=..."),
        (["checkpoint=nowhere"], "checkpoint=nowhere: there is no such checkpoint"),
        (["checkpoint=text.pt"], "text.pt"),
        (["checkpoint=runs:/1234"], "checkpoint=runs:/1234: needs an MLflow store"),
        (["checkpoint=run", "method.peers=3"], "method.peers: is settled by the checkpoint"),
        (["checkpoint=run", "experiment=quickstart"], "experiment: is settled by the checkpoint"),
        (["checkpoint=run", "ablation=no_leader"], "ablation: is settled by the checkpoint"),
    ],
)
def test_bad_input_is_refused_by_name(okddip: Okddip, overrides: list[str], message: str) -> None:
    Path("text.pt").write_text("no checkpoint")
    Path("run").mkdir()
    state = {key: kind() for key, kind in checkpoint.REQUIRED_KEYS.items()}
    state["config"] = {group: {} for group in checkpoint.CONFIG_GROUPS}
    checkpoint.save(state, Path("run"), best=True)
    answer = okddip(*EVALUATE, "tracking=none", *overrides)
    assert answer.code == 1
    assert message in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": None}, "run/last.pt: is not a checkpoint of this program"),
        ({"config": {}}, "run/last.pt: is not a checkpoint of this program"),
        ({"config": [1]}, "run/last.pt: is not a checkpoint of this program"),
        ({"group": {}}, "does not fit: group: Error(s) in loading state_dict"),
        ({"classes": ["a", "b"]}, "classes"),
    ],
)
@pytest.mark.parametrize("task", ["evaluate", "export"])
def test_a_checkpoint_of_something_else_is_refused(
    okddip: Okddip, task: str, change: dict[str, Any], message: str
) -> None:
    state = train(okddip, "method=baseline", "tracking=none", "trainer.epochs=1", "trainer.limit_batches=1")
    checkpoint.save(state | change, Path("run"), best=True)
    answer = okddip(f"task={task}", "checkpoint=run", "tracking=none", "hydra.run.dir=out")
    assert answer.code == 1
    assert "Traceback" not in answer.err
    if (task, change.get("classes")) != ("export", ["a", "b"]):  # there, the weights tell
        assert message in answer.err


def test_confusion_counts_the_answers_to_each_class() -> None:
    predictions = torch.eye(3)[torch.tensor([[0, 1, 1, 2], [0, 0, 0, 0]])]  # [2, 4, 3]
    confusion = count_confusion(predictions, torch.tensor([0, 0, 1, 1]))
    assert confusion.tolist() == [[[1, 1, 0], [0, 1, 1], [0, 0, 0]], [[2, 0, 0], [2, 0, 0], [0, 0, 0]]]
    assert class_accuracy(confusion[0]) == [50.0, 50.0, None]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", [["a $5 bill", "b c$", "犬 кот"], [str(i) for i in range(200)]])
def test_any_class_names_and_counts_can_be_drawn(classes: list[str], tmp_path: Path) -> None:
    draw_confusion(torch.eye(len(classes), dtype=torch.long), classes, "title", tmp_path)
    with Image.open(tmp_path / "confusion.png") as image:
        assert image.width > 500
