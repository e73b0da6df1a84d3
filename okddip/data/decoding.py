"""Image files decoded into memory, once: the decoded images are kept in a cache."""

import hashlib
import logging
import math
import os
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from okddip.data.folder import Listing
from okddip.data.images import BRIGHTEST, read_image
from okddip.distributed import hide_progress_bar
from okddip.errors import ConfigError, raise_problems
from okddip.files import first_of_several, locks_in, write
from okddip.text import for_terminal

log = logging.getLogger(__name__)

CACHE_VERSION = 2  # raise when decoding changes: older caches are then decoded anew
SMALL = 64 * 64  # pixels
MOST_OF_OTHER_SIZES = 20  # where they are many, image_size has been forgotten
ABANDONED_SECONDS = (
    3600.0  # after its last change, a temporary file is left over from a process that was killed
)
CHUNK = 256  # files a thread decodes at a time


def check_memory(description: str, shape: tuple[int, int, int, int]) -> None:
    """Refuse images of a shape [N, H, W, C] that do not fit into the memory of this machine.

    Raises:
        ConfigError: says how much there is.
    """
    needed, memory = math.prod(shape), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        count, height, width, _ = shape
        raise ConfigError(
            f"{description}: {count} images of {height}x{width} need {needed / 2**30:.0f} GiB of memory, this"
            f" machine has {memory / 2**30:.0f}; give a smaller dataset.image_size, or use dataset=imagenet,"
            " which decodes while it trains."
        )


def decode(
    files: Sequence[str],
    size: tuple[int, int] | None,
    channels: int,
    description: str,
    refused: list[str],
) -> tuple[Tensor, list[int]]:
    """Decode files to uint8 [N, H, W, C].

    Args:
        files: paths; at least one.
        size: (height, width) to which images are scaled, the shorter side exactly and the longer one cropped
            at its centre; None takes them as they are, all of one size.
        channels: 3 (RGB) or 1 (grey).
        description: label of the progress bar; any text.
        refused: to which a sentence is added for each file that cannot be read or has another size than the
            first, in whose place the result means nothing; after `MOST_OF_OTHER_SIZES` of another size,
            decoding ends.

    Returns:
        The images, and of each 16-bit image the largest value.
    """
    reader = Reader(files, size, channels)
    description = for_terminal(description)
    number, first = next(
        ((index, image) for index in range(len(files)) if (image := reader.read(index)) is not None),
        (0, None),
    )
    if first is None:
        refused.extend(reader.unreadable.values())
        return torch.empty(0, 0, 0, channels, dtype=torch.uint8), []
    check_memory(description, (len(files), *first.shape))
    images = np.empty((len(files), *first.shape), dtype=np.uint8)
    other_sizes: dict[int, str] = {}
    stop = threading.Event()

    def fill(start: int) -> int:
        for index, path in enumerate(files[start : start + CHUNK], start):
            if stop.is_set():
                break
            if index < number or (image := reader.read(index)) is None:
                continue
            if image.shape == first.shape:
                images[index] = image
                continue
            other_sizes[index] = (
                f"{for_terminal(path)}: is {image.shape[1]}x{image.shape[0]} (width x height), but "
                f"{for_terminal(files[number])} is {first.shape[1]}x{first.shape[0]}; all images must be of "
                f"one size, or give dataset.image_size, to which they are scaled."
            )
            if len(other_sizes) >= MOST_OF_OTHER_SIZES:
                stop.set()
        return min(CHUNK, len(files) - start)

    # Pillow decodes without Python's lock; for small images the time is in Python: at 32x32 two
    # threads were measured to take twice as long as one
    threads = 1 if reader.pixels[number] < SMALL else min(16, os.cpu_count() or 1)
    in_threads(fill, len(files), threads, stop, description)
    if len(other_sizes) >= MOST_OF_OTHER_SIZES:
        refused.append(
            f"{description}: after {len(other_sizes)} images of another size the rest was not decoded."
        )
    refused.extend(sentence for _, sentence in sorted((reader.unreadable | other_sizes).items()))
    return torch.from_numpy(images), list(reader.brightest.values())


class Reader:
    """Reads files of images, in any order, and keeps what was noticed.

    Attributes:
        unreadable: by the number of a file, why it cannot be read.
        brightest: by the number of a file, the largest value of a 16-bit image.
        pixels: by the number of a file, how many it has before it is scaled.
    """

    def __init__(self, files: Sequence[str], size: tuple[int, int] | None, channels: int) -> None:
        self.files, self.size, self.channels = files, size, channels
        self.unreadable: dict[int, str] = {}
        self.brightest: dict[int, int] = {}
        self.pixels: dict[int, int] = {}

    def read(self, index: int) -> np.ndarray | None:
        """An image as uint8 [H, W, C], scaled if there is a size; None if it cannot be read."""
        try:
            image = read_image(self.files[index], self.channels)
        except ConfigError as error:
            self.unreadable[index] = str(error)
            return None
        self.pixels[index] = image.width * image.height
        if BRIGHTEST in image.info:
            self.brightest[index] = image.info[BRIGHTEST]
        if self.size is not None and image.size != (self.size[1], self.size[0]):
            image = ImageOps.fit(image, (self.size[1], self.size[0]), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(image.height, image.width, self.channels)


def in_threads(
    fill: Callable[[int], int], count: int, threads: int, stop: threading.Event, description: str
) -> None:
    """Call `fill` with the number of each `CHUNK`'s first file, and show how many files are done.

    Args:
        fill: returns how many files it has done.
        count: of all files.
        stop: is set where an exception, a signal's too, ends the work.
        description: label of the progress bar.
    """
    hidden = hide_progress_bar()
    if hidden:
        print(f"{description}: {count:,} images", file=sys.stderr)
    with (
        tqdm(total=count, desc=description, unit=" images", disable=hidden) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        try:
            for done in pool.map(fill, range(0, count, CHUNK)):
                bar.update(done)
        except BaseException:  # a signal too: Slurm waits half a minute for the end
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def decode_cached(
    root: Path, listing: Listing, size: tuple[int, int] | None, channels: int, cache_dir: Path
) -> dict[str, Tensor]:
    """Decode the images of a listing, or take them from `cache_dir` if nothing has changed since.

    A cache belongs to a folder and its options, and holds the fingerprint of what it was made from. The
    decoded images are mapped from the file, so that runs side by side share its memory. Where these begin
    together, the first decodes and the others wait for it.

    Returns:
        uint8 [N, H, W, C] for each split.

    Raises:
        ConfigError: names all files that cannot be read, or have another size than the rest.
    """
    key = hashlib.sha256(repr((str(root.resolve()), size, channels)).encode("utf-8", "surrogateescape"))
    path = cache_dir / f"{key.hexdigest()[:32]}.pt"
    stamp = f"{CACHE_VERSION} {listing.fingerprint}"
    cached = _load(path, stamp)
    if cached is None:
        waiting = f"{for_terminal(root)}: another process is decoding these images; waiting for it."
        key.update(stamp.encode())  # folders of one name on several machines have a cache each in turn
        with first_of_several(locks_in(cache_dir) / key.hexdigest()[:16], waiting):
            cached = _load(path, stamp)
            if cached is None:
                cached = {"stamp": stamp} | _decode_splits(root, listing, size, channels)
                _save(path, cached)
    _warn_of_few_bits(root, cached.get("brightest", []))  # caches of older versions do not have it
    return cached["images"]


def _decode_splits(
    root: Path, listing: Listing, size: tuple[int, int] | None, channels: int
) -> dict[str, Any]:
    images: dict[str, Tensor] = {}
    brightest: list[int] = []
    refused: list[str] = []
    for split, files in listing.files.items():
        images[split], values = decode(files, size, channels, f"Decoding {root / split}", refused)
        brightest += values
    raise_problems(f"dataset.root={root}", refused)
    shapes = {split: tuple(part.shape[1:3]) for split, part in images.items()}
    if len(set(shapes.values())) > 1:
        raise ConfigError(
            f"{root}: images differ in size (height, width) between the splits: {shapes}; give "
            f"dataset.image_size, to which they are scaled."
        )
    return {"images": images, "brightest": brightest}


def _warn_of_few_bits(root: Path, brightest: list[int]) -> None:
    """Say that 16-bit images hold values of 12 bits, as many cameras and microscopes write them.

    Args:
        root: the folder.
        brightest: the largest value of each 16-bit image.
    """
    if brightest and max(brightest) < 2**12:
        log.warning(
            "%s: no pixel of the %s 16-bit images is above %d of 65,535, so their values seem to have 12"
            " bits or fewer. In 8 bits they are nearly black, 0 to %d of 255; scale their values to 16 bits.",
            *(for_terminal(root), f"{len(brightest):,}", max(brightest), max(brightest) // 257),
        )


def _load(path: Path, stamp: str) -> dict[str, Any] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        cached = torch.load(path, mmap=True, weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file can cause any; the images can be decoded again
        log.warning("%s cannot be read (%s); decoding the images again.", path, error)
        return None
    return cached if cached["stamp"] == stamp else None


def _save(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.stem}-{uuid4().hex}")  # `tempfile` would keep others from reading it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.stem}-*"):  # left over from a process that was killed
            with suppress(FileNotFoundError):  # another process has just removed or renamed it
                if left.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                    left.unlink()
        write(temporary, lambda file: torch.save(content, file))
        temporary.replace(path)  # atomic, also when several runs decode at once
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        log.warning(
            "dataset.cache_dir=%s: cannot be written (%s); the next run decodes again.", path.parent, error
        )
    finally:  # also after a signal
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
