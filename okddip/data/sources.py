"""Sources of images: each function reads a whole data set into memory, as uint8.

Your own source is any function that returns a `Source`, named by `_target_` under `dataset.source`.
"""

import gzip
import hashlib
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from okddip.data.decoding import check_memory, decode_cached
from okddip.data.evaluation_images import evaluation_folder, scan_evaluation
from okddip.data.folder import scan
from okddip.data.options import image_shape
from okddip.data.stratify import stratified_order
from okddip.errors import ConfigError
from okddip.files import first_of_several


class Split(NamedTuple):
    images: Tensor  # [N, H, W, C] uint8
    labels: Tensor  # [N] int64


class Source(NamedTuple):
    train: Split | None  # None: there are test images alone, to measure a network on
    test: Split
    classes: tuple[str, ...]
    test_files: Sequence[str] = ()  # [N] of the test images, where each has a file


def cifar10(root: str) -> Source:
    """CIFAR-10 (Krizhevsky 2009) as torchvision keeps it, downloaded if absent; checksums are verified.

    Raises:
        ConfigError: it is absent and cannot be downloaded, or the archive is damaged.
    """
    from torchvision.datasets import CIFAR10  # here and below: imported only by the runs that use it

    return _cifar(CIFAR10, Path(root).expanduser())


def cifar100(root: str) -> Source:
    """CIFAR-100 (Krizhevsky 2009) with its 100 fine labels; see `cifar10`."""
    from torchvision.datasets import CIFAR100

    return _cifar(CIFAR100, Path(root).expanduser())


def _cifar(dataset: Any, root: Path) -> Source:
    try:
        train = dataset(root, train=True)
    except RuntimeError:  # its MD5 check finds files absent or damaged, or another process unpacks them
        with _first_download(root):
            _fetch(root, dataset.filename, dataset.tgz_md5, [dataset.url])
            with _refusing_damage(root / dataset.filename):
                train = dataset(root, train=True, download=True)  # unpacks, if that process has not
    test = dataset(root, train=False)
    return Source(_cifar_split(train), _cifar_split(test), tuple(train.classes))


def _cifar_split(dataset: Any) -> Split:
    return Split(torch.from_numpy(np.ascontiguousarray(dataset.data)), torch.tensor(dataset.targets))


DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist


def fashion_mnist(root: str) -> Source:
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): 28x28 in grey.

    Read from `root` if it holds the four .gz files itself, else from torchvision's folder below `root`, else
    from Debian's package, else downloaded.

    Raises:
        ConfigError: it is in none of them and cannot be downloaded, or a file is damaged.
    """
    from torchvision.datasets import FashionMNIST

    names = [name for name, _ in FashionMNIST.resources]  # images and labels for training, then for test
    below = Path(root).expanduser() / "FashionMNIST" / "raw"  # where torchvision puts them
    for folder in (Path(root).expanduser(), below, DEBIAN_FASHION_MNIST):
        if all((folder / name).is_file() for name in names):
            break
    else:
        folder = below
        with _first_download(folder):
            for name, md5 in FashionMNIST.resources:
                _fetch(folder, name, md5, [mirror + name for mirror in FashionMNIST.mirrors])
    train_images, train_labels, test_images, test_labels = (
        torch.from_numpy(_read_idx(folder / name, dimensions))
        for name, dimensions in zip(names, (3, 1, 3, 1), strict=True)
    )
    return Source(
        Split(train_images[..., None], train_labels.long()),
        Split(test_images[..., None], test_labels.long()),
        tuple(FashionMNIST.classes),
    )


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """A gzipped IDX file of bytes: 0, 0, 8 for bytes, the number of dimensions, each as int32, the data."""
    with _refusing_damage(path), gzip.open(path) as file:
        content = file.read()
        if content[:4] != bytes((0, 0, 8, dimensions)):
            raise ValueError(f"it does not begin as an IDX file of bytes in {dimensions} dimensions does")
        shape = np.frombuffer(content, ">i4", dimensions, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()


def digits(image_size: int | Sequence[int] | None = 16) -> Source:
    """scikit-learn's 1,797 handwritten digits (Alpaydin and Kaynak 1998), 8x8 in grey, inside its wheel.

    A fixed, stratified fifth of them is the test split.

    Args:
        image_size: a number or (height, width) to which they are scaled bilinearly; None leaves them 8x8.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images)[:, None]  # [N, 1, 8, 8], 0 to 16
    size = image_shape(image_size)
    if size is not None:
        check_memory("dataset=digits", (len(images), *size, 1))
        images = F.interpolate(images, size, mode="bilinear")
    images = (images * (255 / 16)).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    labels = torch.from_numpy(bunch.target).long()
    order = torch.from_numpy(stratified_order(bunch.target))
    test, train = order[: len(order) // 5].sort().values, order[len(order) // 5 :].sort().values
    return Source(
        Split(images[train], labels[train]),
        Split(images[test], labels[test]),
        tuple(map(str, bunch.target_names)),
    )


def image_folder(
    root: str,
    cache_dir: str,
    image_size: int | Sequence[int] | None = None,
    channels: int = 3,
    classes: Sequence[str] | None = None,
) -> Source:
    """Any images in root/train/CLASS/* and root/test/CLASS/*; classes in the order of their sorted names.

    Decoded once and kept in `cache_dir` until a file's name, size or time of change differs.

    Args:
        root: read only.
        cache_dir: made if absent; if it cannot be written, a warning is logged.
        image_size: a number or (height, width), to which images are scaled and cropped; None if all are of
            one size.
        channels: 3 for RGB, 1 for grey.
        classes: of a network that is to be measured: the test images alone are read, of root/test/CLASS/* or
            root/CLASS/*, and may be of some of these classes.

    Raises:
        ConfigError: see `okddip.data.folder` and `okddip.data.decoding`.
    """
    folder, cache = Path(root).expanduser(), Path(cache_dir).expanduser()
    if classes is None:
        listing = scan(folder, ("train", "test"))
    else:
        folder = evaluation_folder(folder, "test")
        listing = scan_evaluation(folder, classes)
    images = decode_cached(folder, listing, image_shape(image_size), channels, cache)
    *train, test = (
        Split(images[split], torch.from_numpy(labels)) for split, labels in listing.labels.items()
    )
    *_, test_files = listing.files.values()
    return Source(train[0] if train else None, test, listing.classes, test_files)


DOWNLOAD_TIMEOUT = 10  # seconds without an answer


def _first_download(folder: Path) -> AbstractContextManager[None]:
    waiting = f"{folder}: another process is downloading a data set; waiting for it."
    return first_of_several(folder / ".download.lock", waiting)


def _fetch(folder: Path, name: str, md5: str, urls: Sequence[str]) -> None:
    """Make sure that folder/name is complete, and download it if it is absent.

    Raises:
        ConfigError: the file has another MD5 sum, or no address serves it.
    """
    from torchvision.datasets.utils import download_url

    path = folder / name
    if path.exists():
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found == md5:
            return
        raise ConfigError(
            f"{path}: is damaged or incomplete (MD5 {found} instead of {md5}). Remove it and start "
            f"again, or download it by hand from {urls[0]}."
        )
    failures = []
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # into a temporary folder first, so that an interrupted download never has the file's name
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            for url in urls:
                try:
                    download_url(url, temporary, name, md5)
                    shutil.move(Path(temporary) / name, path)
                    return
                except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: another MD5
                    failures.append(f"{url} ({error})")
    except OSError as error:
        failures.append(f"{folder} cannot be written ({error.strerror})")
    finally:
        socket.setdefaulttimeout(timeout)
    raise ConfigError(
        f"{path} is not there and could not be downloaded: {'; '.join(failures)}. Download it by hand from "
        f"{urls[0]} to {path}, or set dataset.root to the folder that has it."
    )


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); remove or replace it.") from error
