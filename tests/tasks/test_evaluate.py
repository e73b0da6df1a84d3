"""Task evaluate: the numbers of the run, and more of them."""

import json
import shutil
import socket
import time
import tracemalloc
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Answer, quick_first
from matplotlib.figure import Figure
from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from okddip.data.sources import digits
from okddip.errors import ConfigError
from okddip.run.parts import Parts
from okddip.tasks.evaluate import task
from okddip.tasks.evaluate.images import name_absent_classes, other_images
from okddip.tasks.evaluate.measure import Answers, class_accuracy, most_confused, unweighted
from okddip.tasks.evaluate.results import draw_confusion, write_predictions
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


@pytest.mark.parametrize("method", quick_first("okddip", "one", "independent", "ffl", "pcl"))
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


def test_a_run_of_mlflow_is_measured_into_a_run_of_mlflow(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = train(okddip)
    monkeypatch.delenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", raising=False)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("okddip").experiment_id
    [run] = client.search_runs([experiment])
    reference = f"runs:/{run.info.run_id}/best.pt"
    answer = okddip(*EVALUATE, f"checkpoint={reference}")
    assert answer.code == 0, answer.err
    assert report()["checkpoint"] == reference
    assert f"checkpoint {reference}, epoch" in answer.out
    assert not MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.get()
    assert "leader *" in answer.out
    assert "data set   digits, 359 test images" in answer.out
    [evaluation] = client.search_runs([experiment], "tags.kind = 'evaluation'")
    assert evaluation.info.status == "FINISHED"
    assert evaluation.data.params["model.depth"] == "8"
    best = state["history"]["best"]
    assert evaluation.data.metrics["test/leader/top1"] == best["test/leader/top1"]
    for name in ("ece", "balanced_accuracy", "macro_f1"):
        assert evaluation.data.metrics[f"test/leader/{name}"] == report()["metrics"][f"leader/{name}"]
    artifacts = {file.path for file in client.list_artifacts(evaluation.info.run_id)}
    assert {"evaluation.json", "predictions.csv", "confusion.png", "confusion.pdf"} <= artifacts


def test_predictions_classes_and_confusion_add_up_to_the_accuracy(okddip: Okddip) -> None:
    state = train(okddip, "tracking=none")
    answer = okddip(*EVALUATE, "checkpoint=run", "tracking=none")
    assert answer.code == 0
    table = pd.read_csv("evaluation/predictions.csv", dtype={"label": str, "prediction": str})
    assert list(table) == ["index", "label", "predictor", "prediction", "probability"]
    metrics = report()["metrics"]
    for predictor, rows in table.groupby("predictor"):
        assert rows["index"].tolist() == list(range(359))
        assert rows["label"].tolist() == [str(label) for label in digits().test.labels.tolist()]
        right = rows["label"] == rows["prediction"]
        assert 100 * right.sum() / 359 == metrics[f"{predictor}/top1"]
        assert rows["probability"].between(0.1, 1).all()
        by_class = right.groupby(rows["label"]).mean()
        assert 100 * by_class.mean() == pytest.approx(metrics[f"{predictor}/balanced_accuracy"])
        assert (100 * by_class).tolist() == pytest.approx(report()["class_accuracy"][predictor])
    lowest = min(zip(report()["class_accuracy"]["leader"], report()["classes"], strict=True))
    assert f"hardest    '{lowest[1]}' {lowest[0]:.1f} %, '" in answer.out
    counts = torch.tensor(report()["confusion"]["counts"])
    assert report()["confusion"]["predictor"] == "leader"
    assert counts.sum() == report()["images"] == 359
    assert counts.sum(1).equal(digits().test.labels.bincount())
    assert 100 * counts.trace().item() / 359 == state["metrics"]["test/leader/top1"]
    assert report()["class_accuracy"].keys() == {"peer0", "peer1", "peer2", "leader", "ensemble"}
    assert Image.open("evaluation/confusion.png").format == "PNG"
    assert Path("evaluation/confusion.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_another_data_set_with_the_same_classes(okddip: Okddip, tmp_path: Path) -> None:
    state = train(okddip, "method=baseline", "tracking=none")
    write_digits(tmp_path / "same", [str(digit) for digit in range(10)])
    write_digits(tmp_path / "others", ["zero", "one", "two", *map(str, range(3, 10))])
    shutil.rmtree("same/train")
    shutil.rmtree("others/train")
    command = (*EVALUATE, "checkpoint=run", "tracking=none", "dataset=image_folder")
    answer = okddip(*command, "dataset.root=same", "dataset.source.channels=1")
    assert answer.code == 0, answer.err
    assert report()["dataset"] == "image_folder"
    # in another order: what is counted is the same, what is summed nearly so
    assert report()["metrics"]["student/top1"] == state["metrics"]["test/top1"]
    assert report()["metrics"]["loss"] == pytest.approx(state["metrics"]["test/loss"], rel=1e-5)

    answer = okddip(*command, "dataset.root=others", "dataset.source.channels=1")
    assert answer.code == 1
    assert "others/test: has classes that the checkpoint does not know: 'one', 'two', 'zero'." in answer.err
    assert "It was trained on '0', '1', '2'" in answer.err
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


@pytest.mark.parametrize("name", quick_first("evaluation.json", "predictions.csv", "confusion.pdf"))
def test_what_cannot_be_written_is_named(okddip: Okddip, name: str) -> None:
    train(okddip, "method=baseline", "tracking=none", "trainer.limit_batches=1")
    Path("evaluation", name, "in the way").mkdir(parents=True)
    answer = okddip(*EVALUATE, "checkpoint=run", "tracking=none", "trainer.limit_batches=1")
    assert answer.code == 1
    files = "evaluation.json, predictions.csv, confusion.png, confusion.pdf"
    assert f"evaluation: {files} cannot be written (" in answer.err
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


def test_classes_of_unequal_size_count_the_same() -> None:
    labels, predictions = np.array([0, 0, 0, 3, 3]), np.array([0, 0, 1, 3, 0])
    assert class_accuracy(labels, predictions, 5) == pytest.approx([200 / 3, None, None, 50, None])
    # of class 0 two of three are right, among three that are called so; of class 3 one of two, among one
    assert unweighted(labels, predictions) == pytest.approx((100 * 7 / 12, 100 * (2 / 3 + 2 / 3) / 2))
    assert most_confused(labels, predictions, 5) == [(0, 1, 1), (3, 0, 1)]
    assert most_confused(labels, labels, 5) == []


def drawn(classes: list[str]) -> dict[str, Any]:
    counts = np.eye(len(classes), dtype=int).tolist()
    report = {"model": "m_$1", "dataset": "d", "classes": classes, "images": 1200}
    return report | {"confusion": {"predictor": "peer0", "counts": counts}, "metrics": {"peer0/top1": 98.765}}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", [["a $5 bill", "b c$", "犬 кот"], [str(i) for i in range(200)]])
def test_any_class_names_and_counts_can_be_drawn(classes: list[str], tmp_path: Path) -> None:
    draw_confusion(drawn(classes), tmp_path)
    with Image.open(tmp_path / "confusion.png") as image:
        assert image.width > 500


def test_a_figure_says_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    draw_confusion(drawn(["a", "b"]), tmp_path)
    assert figures[0].axes[0].get_title() == "m_$1 on d\npeer0: top-1 98.77 %, n = 1,200"


def test_predictions_of_hostile_names_are_read_back_by_pandas(tmp_path: Path) -> None:
    classes = ["=cmd()", 'a, "b"\n', "\x1b[31mred"]
    files = ["photos/=1+1.png", "photos/a,b.png", "=x.png"]
    answers = Answers(
        images=np.array([0, 2]),  # the second cannot be read
        labels=np.array([0, 1]),
        predictions=np.array([[0, 2], [1, 1]]),
        probabilities=np.array([[0.5, 0.75], [0.125, 1.0]], dtype=np.float32),
    )
    write_predictions(answers, ["leader", "peer0"], classes, files, tmp_path / "predictions.csv")
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert table.to_dict("list") == {
        "index": [0, 0, 2, 2],
        "file": ["photos/=1+1.png", "photos/=1+1.png", "'=x.png", "'=x.png"],
        "label": ["'=cmd()", "'=cmd()", 'a, "b"\\n', 'a, "b"\\n'],
        "predictor": ["leader", "peer0", "leader", "peer0"],
        "prediction": ["'=cmd()", 'a, "b"\\n', "\\x1b[31mred", 'a, "b"\\n'],
        "probability": [0.5, 0.125, 0.75, 1.0],
    }


STATE = {
    **{"classes": ["2", "10", "7", "Größe"], "channels": 1, "mean": [0.5], "std": [0.25]},
    "config": {"options": {"dataset": "mine"}},
}


def grey_photos(folder: Path, *classes: str) -> None:
    for shade, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        Image.new("L", (20, 30), shade).save(folder / name / "only.png")


@pytest.mark.parametrize("place", ["photos", "photos/test"])
def test_new_photos_need_neither_training_images_nor_all_classes(
    configured: Callable[..., DictConfig], place: str, caplog: pytest.LogCaptureFixture
) -> None:
    grey_photos(Path(place), "7", unicodedata.normalize("NFD", "Größe"))
    options = ("dataset=image_folder", "dataset.root=photos", "dataset.image_size=8")
    node = configured(*options, "dataset.source.channels=1").dataset
    dataset = other_images(node, STATE)
    assert dataset.sizes == {"test": 2}
    assert dataset.classes == ("2", "10", "7", "Größe")
    assert dataset.splits["test"].labels.tolist() == [2, 3]
    assert [Path(file).parent.name for file in dataset.test_files] == [
        "7",
        unicodedata.normalize("NFD", "Größe"),
    ]
    with caplog.at_level("INFO"):
        name_absent_classes(dataset)
    assert "2 of the checkpoint's 4 have images here, matched by name; none of: '2', '10'" in caplog.text
    grey_photos(Path(place), "eight", "\x1b[31m")
    with pytest.raises(
        ConfigError, match=rf"^{place}: has classes that .* not know: '\\x1b\[31m', 'eight'\. It"
    ):
        other_images(node, STATE)
    with pytest.raises(ConfigError, match=r"image channels 3, .* on dataset=mine with image channels 1"):
        other_images(configured(*options).dataset, STATE)


def test_a_folder_of_training_images_alone_is_not_taken_for_classes(
    configured: Callable[..., DictConfig],
) -> None:
    grey_photos(Path("photos/train"), "7")
    node = configured("dataset=image_folder", "dataset.root=photos", "dataset.source.channels=1").dataset
    with pytest.raises(ConfigError, match="photos/test: there is no such folder"):
        other_images(node, STATE)


def test_new_photos_may_be_streamed(configured: Callable[..., DictConfig]) -> None:
    grey_photos(Path("photos"), "10", "7")
    Path("photos/10/only.png").write_bytes(b"no image")
    node = configured("dataset=imagenet", "dataset.root=photos", "dataset.workers=0").dataset
    dataset = other_images(node, STATE | {"channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3})
    loader = dataset.eval_loader("test", 2, torch.device("cpu"))
    assert [labels.tolist() for _, labels in loader.batches()] == [[2]]
    assert loader.unread == {0}
    assert dataset.test_files == ["photos/10/only.png", "photos/7/only.png"]


def test_a_known_data_set_may_have_some_of_the_classes(configured: Callable[..., DictConfig]) -> None:
    classes = ["other", *map(str, reversed(range(10)))]
    dataset = other_images(configured("dataset=digits").dataset, STATE | {"classes": classes})
    assert dataset.sizes == {"test": 359}
    assert dataset.splits["test"].labels.equal(10 - digits().test.labels)
    with pytest.raises(
        ConfigError, match="dataset=digits: has classes that the checkpoint does not know: '9'"
    ):
        other_images(configured("dataset=digits").dataset, STATE | {"classes": classes[:1] + classes[2:]})


def test_many_classes_take_memory_and_files_in_proportion(
    synthetic_parts: Callable[..., Parts], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = synthetic_parts("model=resnet8", "method=independent", "method.peers=2")
    classes = [f"c{number}" for number in range(20_000)]
    labels = np.arange(100) * 150
    mistaken = np.where(labels < 300, 19_999, labels)
    predictions = np.stack([labels, mistaken, labels])  # of peer0, peer1 and their ensemble
    answers = Answers(np.arange(100), labels, predictions, np.ones((3, 100)))
    state = {"epoch": 0, "classes": classes, "history": {"last": {"val/peer1/top1": 98.0}}}
    tracemalloc.start()
    with patch.object(task, "measure", lambda *_: ({"peer1/top1": 98.0}, answers)):
        report, _ = task.report_on(parts, state, "run/last.pt", {"model": "m", "dataset": "d"})
    with caplog.at_level("INFO"):
        files = task.write_report(report, answers, parts, tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6  # bytes; the confusion matrix would be 3.2 GB
    assert report["confusion"]["most_frequent"] == [
        {"class": "c0", "predicted": "c19999", "images": 1},
        {"class": "c150", "predicted": "c19999", "images": 1},
    ]
    assert [file.name for file in files] == ["evaluation.json", "predictions.csv"]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1e6
    assert "20,000 classes are too many for a confusion matrix" in caplog.text
