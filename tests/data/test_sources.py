"""Sources, each on files of its real format."""

import gzip
import hashlib
import multiprocessing
import pickle
import sys
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets

from okddip.data import sources
from okddip.data.sources import cifar10, cifar100, digits, fashion_mnist
from okddip.errors import ConfigError


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


# CIFAR, in pickled batches as its authors published it


def batch(labels_key: str, labels: list[int], seed: int) -> dict[str, Any]:
    data = np.random.default_rng(seed).integers(256, size=(len(labels), 3072), dtype=np.uint8)
    return {"data": data, labels_key: labels, "batch_label": "a batch", "filenames": ["x.png"] * len(labels)}


def publish(folder: Path, dataset: Any, files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The archive of a small CIFAR, with torchvision's checksums set to it."""
    base = folder / dataset.base_folder
    base.mkdir(parents=True)
    sums = {}
    for name, content in files.items():
        (base / name).write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    archive = folder / dataset.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(base, dataset.base_folder)
    meta = dataset.meta["filename"]
    for key, value in {
        "train_list": [[name, sums[name]] for name in files if "test" not in name and name != meta],
        "test_list": [[name, sums[name]] for name in files if "test" in name],
        "meta": dataset.meta | {"md5": sums[meta]},
        "tgz_md5": hashlib.md5(archive.read_bytes()).hexdigest(),
    }.items():
        monkeypatch.setattr(dataset, key, value)
    return archive.read_bytes()


CIFAR10_FILES = {
    "data_batch_1": batch("labels", [3, 0], seed=1),
    "data_batch_2": batch("labels", [9, 1, 1], seed=2),
    "test_batch": batch("labels", [8, 5], seed=3),
    "batches.meta": {"label_names": [f"class{i}" for i in range(10)]},
}


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    # CIFAR100 is a subclass of CIFAR10 in torchvision, with lists of its own
    return publish(tmp_path / "published", torchvision.datasets.CIFAR10, CIFAR10_FILES, monkeypatch)


def names(folder: Path) -> set[str]:
    """What is in a folder but for the lock file, which filelock may keep."""
    return {path.name for path in folder.iterdir()} - {".download.lock"}


def test_cifar10_is_read_from_its_unpacked_batches(tmp_path: Path, published: bytes) -> None:
    source = cifar10(str(tmp_path / "published"))
    assert source.train.labels.tolist() == [3, 0, 9, 1, 1]
    assert source.test.labels.tolist() == [8, 5]
    assert source.classes == tuple(f"class{i}" for i in range(10))
    assert source.train.images.shape == (5, 32, 32, 3)
    assert source.train.images.dtype == torch.uint8
    # a row of the file is 1024 red, 1024 green and 1024 blue values
    row = torch.from_numpy(CIFAR10_FILES["data_batch_2"]["data"][0])
    assert torch.equal(source.train.images[2], row.view(3, 32, 32).permute(1, 2, 0))


def test_cifar10_is_unpacked_from_an_archive_put_there_by_hand(tmp_path: Path, published: bytes) -> None:
    root = tmp_path / "by hand"
    root.mkdir()
    (root / "cifar-10-python.tar.gz").write_bytes(published)
    assert cifar10(str(root)).train.labels.tolist() == [3, 0, 9, 1, 1]


def test_cifar10_is_downloaded_if_absent(
    tmp_path: Path, published: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = (tmp_path / "published" / "cifar-10-python.tar.gz").as_uri()
    opened = urllib.request.build_opener(urllib.request.FileHandler)

    class Response:
        """What http gives and a file: address does not: the length and the final address."""

        def __init__(self) -> None:
            self.content = opened.open(served)
            self.url = torchvision.datasets.CIFAR10.url
            self.length = len(published)

        def read(self, size: int) -> bytes:
            return self.content.read(size)

        def __enter__(self) -> "Response":
            return self

        def __exit__(self, *exception: object) -> None:
            self.content.close()

    monkeypatch.setattr(urllib.request, "urlopen", lambda request: Response())
    root = tmp_path / "new" / "data"
    assert cifar10(str(root)).train.labels.tolist() == [3, 0, 9, 1, 1]
    assert names(root) == {"cifar-10-batches-py", "cifar-10-python.tar.gz"}


def test_runs_that_begin_together_download_and_unpack_once(
    tmp_path: Path, published: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(url: str, root: str, filename: str, md5: str) -> None:
        if (Path(root) / filename).exists():
            return  # as torchvision asks before it unpacks
        with (tmp_path / "downloads").open("a") as log:
            log.write(f"{filename}\n")
        time.sleep(0.5)
        (Path(root) / filename).write_bytes(published)

    def run() -> None:
        sys.exit(cifar10(str(tmp_path / "new")).train.labels.tolist() != [3, 0, 9, 1, 1])

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download)
    processes = [multiprocessing.get_context("fork").Process(target=run) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "downloads").read_text().split() == ["cifar-10-python.tar.gz"]


def test_a_data_set_that_cannot_be_downloaded_is_refused_with_its_address(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        cifar10(str(tmp_path))
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in str(error.value)
    assert str(tmp_path / "cifar-10-python.tar.gz") in str(error.value)
    assert "no network in tests" in str(error.value)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("kept", [0, 0.5, 0.999])
def test_a_half_downloaded_archive_is_refused_by_name(tmp_path: Path, published: bytes, kept: float) -> None:
    root = tmp_path / "half"
    root.mkdir()
    archive = root / "cifar-10-python.tar.gz"
    archive.write_bytes(published[: int(kept * len(published))])
    with pytest.raises(ConfigError, match=r"cifar-10-python\.tar\.gz: is damaged or incomplete"):
        cifar10(str(root))
    assert archive.exists()


def test_a_download_that_ends_early_leaves_nothing_behind(
    tmp_path: Path, published: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(url: str, root: str, filename: str, md5: str) -> None:
        (Path(root) / filename).write_bytes(published[:100])
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", half)
    with pytest.raises(ConfigError, match="could not be downloaded"):
        cifar10(str(tmp_path / "new"))
    assert names(tmp_path / "new") == set()


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.undo()  # the real urlopen
    monkeypatch.setattr(sources, "DOWNLOAD_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts and says nothing
        url = f"http://127.0.0.1:{server.getsockname()[1]}/cifar-10-python.tar.gz"
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
        with pytest.raises(ConfigError, match="timed out"):
            cifar10(str(tmp_path))
    assert socket.getdefaulttimeout() is None


def test_a_data_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be written"):
        cifar10(str(tmp_path / "file" / "data"))


def test_cifar100_is_read_with_its_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "train": batch("fine_labels", [99, 0, 7], seed=1) | {"coarse_labels": [1, 2, 3]},
        "test": batch("fine_labels", [42], seed=2) | {"coarse_labels": [4]},
        "meta": {"fine_label_names": [f"fine{i}" for i in range(100)], "coarse_label_names": []},
    }
    publish(tmp_path, torchvision.datasets.CIFAR100, files, monkeypatch)
    source = cifar100(str(tmp_path))
    assert source.train.labels.tolist() == [99, 0, 7]
    assert source.test.labels.tolist() == [42]
    assert len(source.classes) == 100


# Fashion-MNIST, in gzipped IDX files


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


IMAGES = np.random.default_rng(0).integers(256, size=(5, 28, 28), dtype=np.uint8)
FASHION_FILES = {
    "train-images-idx3-ubyte.gz": idx(IMAGES[:3]),
    "train-labels-idx1-ubyte.gz": idx(np.array([9, 0, 4], dtype=np.uint8)),
    "t10k-images-idx3-ubyte.gz": idx(IMAGES[3:]),
    "t10k-labels-idx1-ubyte.gz": idx(np.array([1, 2], dtype=np.uint8)),
}


@pytest.fixture
def no_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "no package")


@pytest.mark.parametrize("place", ["root", "torchvision", "debian"])
def test_fashion_mnist_is_read_from_every_place(
    tmp_path: Path, place: str, no_debian: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("FashionMNIST/raw" if place == "torchvision" else place)
    folder.mkdir(parents=True)
    for name, content in FASHION_FILES.items():
        (folder / name).write_bytes(content)
    if place == "debian":
        monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", folder)
    source = fashion_mnist(str(folder if place == "root" else tmp_path))
    assert torch.equal(source.train.images, torch.from_numpy(IMAGES[:3, :, :, None]))
    assert torch.equal(source.test.images, torch.from_numpy(IMAGES[3:, :, :, None]))
    assert source.train.labels.tolist() == [9, 0, 4]
    assert source.test.labels.tolist() == [1, 2]
    assert source.classes[9] == "Ankle boot"


@pytest.mark.skipif(not sources.DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_of_debian_is_whole(tmp_path: Path) -> None:
    source = fashion_mnist(str(tmp_path))
    assert source.train.images.shape == (60_000, 28, 28, 1)
    assert source.test.labels.bincount().tolist() == [1000] * 10


def test_fashion_mnist_that_is_nowhere_is_refused_with_its_address(tmp_path: Path, no_debian: None) -> None:
    with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte\.gz is not there.*http://fashion-mnist"):
        fashion_mnist(str(tmp_path))


WHOLE = FASHION_FILES["t10k-images-idx3-ubyte.gz"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        WHOLE[: len(WHOLE) // 2],
        WHOLE[:-1],
        WHOLE[:500] + b"x" * 50 + WHOLE[550:],
        idx(IMAGES[0]),
        gzip.compress(gzip.decompress(WHOLE)[:-1]),
    ],
    ids=["empty", "text", "half", "one byte short", "altered", "two dimensions", "one pixel short"],
)
def test_a_damaged_file_of_fashion_mnist_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    for name, good in FASHION_FILES.items():
        (tmp_path / name).write_bytes(content if name.startswith("t10k-images") else good)
    with pytest.raises(ConfigError, match=r"t10k-images-idx3-ubyte\.gz: cannot be read"):
        fashion_mnist(str(tmp_path))


# Digits


def test_digits_are_split_four_to_one_and_stratified() -> None:
    source = digits()
    assert source.train.images.shape == (1438, 16, 16, 1)
    assert source.test.images.shape == (359, 16, 16, 1)
    counts = source.test.labels.bincount()
    assert counts.min() >= 34
    assert counts.max() <= 37
    whole = torch.cat([source.train.images, source.test.images]).flatten(1).unique(dim=0)
    assert len(whole) == 1797


def test_digits_keep_their_pixels_where_they_are_not_scaled() -> None:
    from sklearn.datasets import load_digits

    source = digits(image_size=None)
    ours = torch.cat([source.train.images, source.test.images]).flatten(1).unique(dim=0)
    theirs = torch.from_numpy(load_digits().data * 255 / 16).round().to(torch.uint8).unique(dim=0)
    assert torch.equal(ours, theirs)
    assert digits(image_size=[20, 24]).train.images.shape == (1438, 20, 24, 1)
