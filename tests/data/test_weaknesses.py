"""Data sets whose accuracies say less than they seem to are warned about, with the count."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Answer, folders_of_images

from okddip.data.dataset import Dataset
from okddip.data.sources import Source, Split, digits
from okddip.data.streaming import StreamingDataset
from okddip.data.weaknesses import weaknesses

Okddip = Callable[..., Answer]
SMALL = (
    *("model=resnet8", "method=baseline", "trainer.epochs=1", "trainer.limit_batches=1", "tracking=none"),
    *("dataset=image_folder", "dataset.root=images"),
)


def some(images: int, classes: int, *, like: torch.Tensor | None = None) -> Split:
    pixels = torch.randint(256, (images, 8, 8, 3), dtype=torch.uint8)
    if like is not None:
        pixels[: len(like)] = like
    return Split(pixels, torch.arange(images) % classes)


def made(train: Split, test: Split, classes: int, **options: float) -> Dataset:
    return Dataset(name="mine", source=Source(train, test, tuple("abcdefghij"[:classes])), **options)


def test_digits_and_random_images_have_none() -> None:
    assert weaknesses(Dataset(name="digits", source=digits(), validation=0.1)) == []
    assert weaknesses(made(some(40, 2), some(20, 2), 2)) == []


def test_images_of_another_split_are_counted_wherever_they_stand() -> None:
    train = some(40, 2)
    dataset = made(train, some(20, 2, like=train.images[30:33]), 2)
    [weakness] = weaknesses(dataset)
    assert weakness.startswith(
        "dataset mine: 3 of the 20 test images are training images too, pixel for pixel"
    )
    assert weaknesses(dataset, overlap=False) == []
    almost = train.images[30:33].clone()
    almost[:, 0, 0, 0] ^= 1
    assert weaknesses(made(train, some(20, 2, like=almost), 2)) == []


def test_what_is_held_out_of_doubled_images_is_counted() -> None:
    pixels = some(40, 2).images.repeat(2, 1, 1, 1)
    dataset = made(Split(pixels, torch.arange(80) % 2), some(20, 2), 2, validation=0.2)
    known = {tuple(image.flatten().tolist()) for image in dataset.splits["train"].images}
    shared = sum(tuple(image.flatten().tolist()) in known for image in dataset.splits["val"].images)
    [weakness] = weaknesses(dataset)
    assert weakness.startswith(f"dataset mine: {shared} of the 16 validation images are training images")


def test_one_class_is_warned_about_in_all_splits_or_in_one() -> None:
    assert weaknesses(made(some(40, 1), some(20, 1), 1)) == [
        "dataset mine: has 1 class, so every accuracy is 100 %."
    ]
    assert weaknesses(made(some(40, 2), some(20, 1), 2)) == [
        "dataset mine: all 20 test images are of 1 class of its 2 ('a')."
    ]


def test_of_a_streamed_data_set_no_image_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders_of_images(tmp_path / "one", "cat", seed=0)
    folders_of_images(tmp_path / "two", "cat", "dog", seed=0)
    constants = {"mean": [0.5] * 3, "std": [0.2] * 3}
    for root in ("one", "two"):
        (tmp_path / root / "test").rename(tmp_path / root / "val")
    one, two = (StreamingDataset(name=name, root=name, **constants) for name in ("one", "two"))
    monkeypatch.setattr("okddip.data.streaming.read_image", None)
    assert weaknesses(two) == []
    assert len(weaknesses(one)) == 1


def test_the_images_of_cifar10_take_less_than_a_second() -> None:
    dataset = made(some(50_000, 10), some(10_000, 10), 10)
    dataset.splits = {
        name: Split(part.images.repeat(1, 4, 4, 1), part.labels) for name, part in dataset.splits.items()
    }
    begun = time.process_time()
    assert weaknesses(dataset) == []
    assert time.process_time() - begun < 1


def test_a_run_and_an_evaluation_of_it_say_so_once_and_one_of_other_images_does_not(
    okddip: Okddip, tmp_path: Path
) -> None:
    folders_of_images(Path("images"), "cat", "dog", seed=0)
    shutil.copy("images/train/cat/0.png", "images/test/cat/0.png")
    shutil.copy("images/train/cat/1.png", "images/test/dog/1.png")
    folders_of_images(Path("others"), "cat", "dog", seed=1)
    shutil.rmtree("others/test")
    shutil.copytree("others/train", "others/test")
    said = "2 of the 16 test images are training images too, pixel for pixel"
    answer = okddip(*SMALL, "hydra.run.dir=run")
    assert answer.code == 0, answer.err
    assert (answer.out + answer.err).count(said) == 1
    command = ("task=evaluate", "checkpoint=run", "tracking=none")
    assert okddip(*command).out.count(said) == 1
    answer = okddip(*command, "dataset=image_folder", "dataset.root=others")
    assert answer.code == 0, answer.err
    assert "training images too" not in answer.out + answer.err


def test_a_run_on_one_class_says_that_its_accuracy_means_nothing(okddip: Okddip) -> None:
    folders_of_images(Path("images"), "cat", seed=0)
    answer = okddip(*SMALL, "method=okddip")
    assert answer.code == 0, answer.err
    assert (answer.out + answer.err).count("has 1 class, so every accuracy is 100 %") == 1
