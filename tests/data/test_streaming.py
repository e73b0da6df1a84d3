"""Data sets that are decoded while training."""

import multiprocessing
import os
import signal
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from okddip.data.streaming import StreamingDataset, StreamingLoader
from okddip.errors import ConfigError
from okddip.signals import stop_on_signals
from okddip.tasks.benchmark.counting import OperatorCounter

CPU = torch.device("cpu")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """ImageNet's folders, with 2 classes, 6 training and 3 validation images in each, of various sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("n01440764", "n01443537"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                height, width = rng.integers(30, 60, size=2)
                pixels = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.JPEG")
    return tmp_path


def streamed(root: Path, **options: Any) -> StreamingDataset:
    given = {"image_size": 24, "resize": 28, "workers": 0, "mean": MEAN, "std": STD}
    return StreamingDataset(name="tiny", root=str(root), **given | options)


def collect(loader: StreamingLoader, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader.batches(epoch), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_it_has_the_face_of_a_data_set_in_memory(root: Path) -> None:
    dataset = streamed(root, validation=0.34, train_size=6)
    assert dataset.classes == ("n01440764", "n01443537")
    assert dataset.sizes == {"train": 6, "test": 6, "val": 4}
    assert dataset.image_size == (24, 24)
    assert dataset.channels == 3
    loader = dataset.train_loader(4, CPU, seed=0)
    assert len(loader) == 2
    assert loader.size == 6
    batches = list(loader.batches(0))
    assert [images.shape for images, _ in batches] == [(4, 3, 24, 24), (2, 3, 24, 24)]
    assert batches[0][0].dtype == torch.float32


def test_test_images_are_scaled_cropped_at_the_centre_and_in_order(root: Path) -> None:
    images, labels = collect(streamed(root).eval_loader("test", 4, CPU))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    with Image.open(root / "val" / "n01440764" / "1.JPEG") as file:
        image = TF.center_crop(TF.resize(file.convert("RGB"), 28), 24)
    torch.testing.assert_close(images[1], TF.normalize(TF.to_tensor(image), MEAN, STD))


def test_draws_hang_on_seed_and_epoch_and_not_on_the_workers(root: Path) -> None:
    alone, labels = collect(streamed(root).train_loader(5, CPU, seed=1), epoch=2)
    torch.manual_seed(99)
    helped, labels_helped = collect(streamed(root, workers=2).train_loader(5, CPU, seed=1), epoch=2)
    assert torch.equal(alone, helped)
    assert torch.equal(labels, labels_helped)
    for seed, epoch in ((1, 3), (2, 2)):
        assert not torch.equal(alone, collect(streamed(root).train_loader(5, CPU, seed=seed), epoch)[0])


def test_an_image_is_cropped_anew_in_every_epoch(root: Path) -> None:
    loader = streamed(root).train_loader(12, CPU, seed=0)
    first, second = collect(loader, 0)[0], collect(loader, 1)[0]
    # in another order too: no image of the second epoch is one of the first
    assert not (first[:, None] == second[None]).flatten(2).all(dim=2).any()


def test_the_default_generator_is_left_as_it_was(root: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    collect(streamed(root).train_loader(4, CPU, seed=0))
    collect(streamed(root).eval_loader("test", 4, CPU))
    assert torch.equal(before, torch.get_rng_state())


def test_workers_end_with_their_epoch_and_when_it_is_left_early(root: Path) -> None:
    loader = streamed(root, workers=2).train_loader(2, CPU, seed=0)
    collect(loader)
    assert multiprocessing.active_children() == []
    batches = loader.batches(1)
    next(batches)
    assert multiprocessing.active_children()
    batches.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []


def test_short_batches_are_left_out_on_request(root: Path) -> None:
    loader = streamed(root).train_loader(5, CPU, seed=0, drop_last=True)
    assert [len(labels) for _, labels in loader.batches(0)] == [5, 5]
    assert len(loader) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_ends_the_run_by_its_name(root: Path, workers: int) -> None:
    (root / "train" / "n01440764" / "3.JPEG").write_bytes(b"no image")
    dataset = streamed(root, workers=workers, bad_images="refuse")
    with pytest.raises(
        ConfigError, match=r"^[^\n]*n01440764/3\.JPEG: is not an image[^\n]*bad_images=skip\.$"
    ):
        collect(dataset.train_loader(4, CPU, seed=0))


def test_all_unreadable_images_of_a_batch_are_named_at_once(root: Path) -> None:
    for number in (0, 2):
        (root / "val" / "n01440764" / f"{number}.JPEG").write_bytes(b"no image")
    dataset = streamed(root, bad_images="refuse")
    with pytest.raises(ConfigError, match=r"2 things are wrong:[^\n]*\n[^\n]*0\.JPEG[^\n]*\n[^\n]*2\.JPEG"):
        collect(dataset.eval_loader("test", 6, CPU))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_skipped_and_counted(
    root: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = root / "train" / "n01440764" / "3.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    loader = streamed(root, workers=workers, bad_images="skip").train_loader(4, CPU, seed=0)
    assert collect(loader)[1].bincount().tolist() == [5, 6]
    assert loader.skipped == 1
    assert "Skipped (1 so far)" in caplog.text
    assert str(path) in caplog.text
    collect(loader, epoch=1)
    assert loader.skipped == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("change", ["deleted", "truncated", "replaced"])
def test_images_may_go_while_the_run_is_on(
    root: Path, workers: int, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    loader = streamed(root, workers=workers).train_loader(4, CPU, seed=0)
    assert len(collect(loader)[1]) == 12
    path = root / "train" / "n01443537" / "2.JPEG"
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        path.unlink()
    if change == "replaced":
        path.mkdir()
    assert len(collect(loader, epoch=1)[1]) == 11
    assert loader.skipped == 1
    assert f"{path}: cannot be decoded" in caplog.text


def test_a_worker_that_dies_ends_the_run_by_name(root: Path) -> None:
    batches = streamed(root, workers=2).train_loader(2, CPU, seed=0).batches(0)
    next(batches)
    with pytest.raises(ConfigError, match=r"dataset\.workers=2: a process that decodes images has died"):  # noqa: PT012
        for worker in multiprocessing.active_children():
            worker.kill()
        list(batches)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (1, 1), (3_000, 20)])
def test_images_of_any_shape_are_read_in_little_memory(root: Path, size: tuple[int, int]) -> None:
    path = root / "val" / "n01440764" / "0.JPEG"
    Image.new("RGB", size, (200, 100, 50)).save(path)
    for split in ("train", "val"):
        Image.new("RGB", size, (200, 100, 50)).save(root / split / "n01440764" / "0.JPEG", quality=95)
    dataset = streamed(root, image_size=224, resize=256)
    loader = dataset.eval_loader("test", 1, CPU)
    tracemalloc.start()
    image, _ = next(loader.batches())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6  # bytes; scaled whole, 1x20,000 would take 4 GB
    expected = (torch.tensor([200, 100, 50]) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(image[0].mean((1, 2)), expected, atol=0.05, rtol=0)
    assert len(collect(dataset.train_loader(12, CPU, seed=0))[1]) == 12


def test_a_batch_without_a_readable_image_is_left_out(root: Path) -> None:
    for number in range(3):
        (root / "val" / "n01440764" / f"{number}.JPEG").write_bytes(b"")
    loader = streamed(root, bad_images="skip").eval_loader("test", 3, CPU)
    assert [labels.tolist() for _, labels in loader.batches()] == [[1, 1, 1]]
    assert loader.skipped == 3


def test_the_host_reads_nothing_once_images_are_decoded(root: Path) -> None:
    loader = streamed(root, workers=2).eval_loader("test", 3, CPU)
    batches = loader.batches()
    next(batches)  # before it the workers start, for which torch reads a seed that is drawn on the host
    with OperatorCounter() as watch:
        assert len(list(batches)) == 1
    assert watch.total > 0
    assert watch.found == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad": 4}, r"dataset\.pad=4, .* do not apply"),
        ({"on_device": True}, r"dataset\.on_device=True: do not apply"),
        ({"resize": 20}, r"dataset\.image_size=24, dataset\.resize=20"),
        ({"image_size": None}, r"dataset\.image_size=None"),
        ({"mean": None, "std": None}, r"dataset\.mean=None"),
        ({"bad_images": "ignore"}, r"dataset\.bad_images=ignore: must be one of refuse, skip"),
        ({"workers": -1}, r"dataset\.workers=-1"),
        ({"train_size": 13}, r"dataset\.train_size=13: the training set has 12"),
        ({"validation": 0.05}, "would have no validation image"),
    ],
)
def test_wrong_options_are_refused(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        streamed(root, **options)


def test_its_folder_is_checked_like_any_other(root: Path) -> None:
    (root / "val" / "n01443537").rename(root / "val" / "n01491361")
    with pytest.raises(ConfigError, match=r"class 'n01443537' has no folder in .*val"):
        streamed(root)


def test_a_signal_while_workers_decode_leaves_none_of_them(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("okddip.data.streaming.read_image", lambda path: time.sleep(600))
    batches = streamed(root, workers=2).train_loader(2, CPU, seed=0).batches(0)
    ask = threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM))
    ask.start()
    with pytest.raises(SystemExit) as held, stop_on_signals():  # with a traceback that holds the iterator
        next(batches)
    assert held.value.code == 143
    deadline = time.monotonic() + 10
    while left := multiprocessing.active_children():
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_the_first_of_several_views_is_the_one_that_others_see(root: Path) -> None:
    plain, labels = collect(streamed(root).train_loader(5, CPU, seed=1), epoch=2)
    views, labels_of_views = collect(streamed(root).train_loader(5, CPU, seed=1, views=2), epoch=2)
    assert torch.equal(labels, labels_of_views)
    assert torch.equal(views[:, 0], plain)
    assert views.shape == (len(labels), 2, 3, 24, 24)
    assert (views[:, 1] != plain).flatten(1).any(1).all()
