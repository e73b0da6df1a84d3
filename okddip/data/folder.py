"""Folders of images: root/SPLIT/CLASS/*, listed, checked and decoded."""

import hashlib
import logging
import math
import os
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from okddip.distributed import hide_progress_bar
from okddip.errors import ConfigError
from okddip.text import composed, for_terminal

log = logging.getLogger(__name__)

# that Pillow may read; its other readers are slow, rare or start other programs
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
CACHE_VERSION = 2  # raise when decoding changes: older caches are then decoded anew
SMALL = 64 * 64  # pixels
MOST_ELONGATED = 16  # of the sides of an image that is scaled whole
ABANDONED_SECONDS = (
    3600.0  # after its last change, a temporary file is left over from a process that was killed
)
CHUNK = 256  # files a thread decodes at a time


class Listing(NamedTuple):
    """The files of a folder, sorted by split, class and name."""

    classes: tuple[str, ...]
    files: dict[str, list[str]]  # paths of each split
    labels: dict[str, np.ndarray]  # int64 [N] of each split
    fingerprint: str  # of all names, sizes and times of change


def scan(root: Path, splits: Sequence[str]) -> Listing:
    """List root/SPLIT/CLASS/*, following links and ignoring what is hidden.

    A class is the name of its folder in Unicode's composed form (NFC), since file systems and archives
    encode the same name in several ways.

    Raises:
        ConfigError: a folder is missing, unreadable or empty, a class is in one split only or has two folders
            in one, or something else lies where only folders or images belong.
    """
    if not root.is_dir():
        raise ConfigError(f"dataset.root={root}: there is no such folder.")
    entries = {split: _entries(root / split) for split in splits}
    folders: dict[str, dict[str, str]] = {split: {} for split in splits}  # of each class
    for split, found in entries.items():
        for entry in found:
            try:
                is_folder = entry.is_dir()
            except OSError as error:  # a link in a circle
                raise ConfigError(
                    f"{for_terminal(entry.path)}: cannot be read ({error.strerror})."
                ) from error
            if not is_folder:
                raise ConfigError(
                    f"{for_terminal(entry.path)}: is not a folder; images belong into {root / split}/CLASS/."
                )
            try:
                entry.name.encode()
            except UnicodeEncodeError:  # reports and exported networks could not name it
                name = ascii(os.fsencode(entry.name))
                raise ConfigError(
                    f"{root / split}: the class {name} has a name that is not UTF-8; rename it."
                ) from None
            [name] = composed([entry.name])
            if name in folders[split]:
                raise ConfigError(
                    f"{root / split}: two folders are called {for_terminal(name)}, in two encodings of"
                    " the same letters (Unicode's NFC and NFD). Move their images into one."
                )
            folders[split][name] = entry.name
        if not found:
            raise ConfigError(f"{root / split}: is empty; expected {root / split}/CLASS/* with images.")
    first, *others = splits
    for other in others:
        for name in sorted(folders[first].keys() ^ folders[other].keys()):
            absent = other if name in folders[first] else first
            raise ConfigError(
                f"{root}: class '{for_terminal(name)}' has no folder in {root / absent}; each class must be"
                " in each split."
            )
    classes = tuple(sorted(folders[first]))

    digest = hashlib.sha256()
    files: dict[str, list[str]] = {split: [] for split in splits}
    labels: dict[str, np.ndarray] = {}
    for split in splits:
        counts = []
        for name in classes:
            folder = root / split / folders[split][name]
            found = sorted(_entries(folder), key=lambda entry: entry.name)
            if not found:
                raise ConfigError(
                    f"{for_terminal(folder)}: is empty; every class needs an image in every split."
                )
            for entry in found:
                digest.update(os.fsencode(f"{split}/{name}/{entry.name}") + _stamp(entry))
            files[split].extend(entry.path for entry in found)
            counts.append(len(found))
        labels[split] = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    return Listing(classes, files, labels, digest.hexdigest())


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ConfigError(f"{for_terminal(folder)}: cannot be listed ({error.strerror}).") from error


def _stamp(entry: os.DirEntry[str]) -> bytes:
    try:
        stat = entry.stat()
        if not entry.is_file():
            raise ConfigError(
                f"{for_terminal(entry.path)}: is not a file; images belong into the folder of their class."
            )
    except OSError as error:
        raise ConfigError(f"{for_terminal(entry.path)}: cannot be read ({error.strerror}).") from error
    return f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode()


def read_image(path: str, channels: int = 3) -> Image.Image:
    """Read a file as an upright 8-bit image in RGB, or in grey for one channel; see `convert`.

    Of an animation the first frame is read.

    Raises:
        ConfigError: names the file and says why it cannot be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            # Pillow itself only warns up to twice its limit
            if Image.MAX_IMAGE_PIXELS and file.width * file.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{file.width}x{file.height} pixels are too many")
            file.load()
            return convert(file, channels)
    except Image.UnidentifiedImageError as error:
        raise ConfigError(
            f"{for_terminal(path)}: is not an image, or its beginning is damaged (known formats:"
            f" {', '.join(FORMATS)}); remove or replace it."
        ) from error
    # damaged files make Pillow's readers raise SyntaxError, struct.error, zlib.error...
    except Exception as error:
        raise ConfigError(
            f"{for_terminal(path)}: cannot be decoded ({error}); remove or replace it."
        ) from error


def convert(image: Image.Image, channels: int) -> Image.Image:
    """An upright 8-bit image in RGB, or in grey for one channel.

    16-bit grey is scaled to 8 bits, transparency is laid on black (as crops are padded with black), palettes
    and other colour spaces are converted, and a JPEG is turned as its EXIF orientation says.

    Raises:
        ValueError: the pixels' range is unknown.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers, of unknown range")
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB" if channels == 3 else "L")


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("grey values outside 0 to 65535")
    values[values == image.info.get("transparency", -1)] = 0  # 8 bits would take in its neighbours
    return Image.fromarray((values // 257).astype(np.uint8))


def scale_and_crop(image: Image.Image, shorter: int, size: tuple[int, int]) -> Image.Image:
    """Scale an image until its shorter side is `shorter`, and crop (height, width) at its centre.

    The pixels are those of torchvision's `Resize` and `CenterCrop`. Of a very long image only the middle is
    scaled: all of 1x20,000 pixels would become 256x5,120,000.
    """
    longest = MOST_ELONGATED * min(image.size)
    if max(image.size) > longest:
        image = crop_at_centre(image, min(image.height, longest), min(image.width, longest))
    least = min(image.size)
    scaled = image.resize(
        (shorter * image.width // least, shorter * image.height // least), Image.Resampling.BILINEAR
    )
    return crop_at_centre(scaled, *size)


def crop_at_centre(image: Image.Image, height: int, width: int) -> Image.Image:
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


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


def decode(files: Sequence[str], size: tuple[int, int] | None, channels: int, description: str) -> Tensor:
    """Decode files to uint8 [N, H, W, C].

    Args:
        files: paths; at least one.
        size: (height, width) to which images are scaled, the shorter side exactly and the longer one cropped
            at its centre; None takes them as they are, all of one size.
        channels: 3 (RGB) or 1 (grey).
        description: label of the progress bar; any text.

    Raises:
        ConfigError: a file cannot be read or has another size than the first; it is named.
    """

    def read(path: str) -> np.ndarray:  # [H, W, C]
        image = read_image(path, channels)
        if size is not None and image.size != (size[1], size[0]):
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(image.height, image.width, channels)

    description = for_terminal(description)
    first = read(files[0])
    check_memory(description, (len(files), *first.shape))
    images = np.empty((len(files), *first.shape), dtype=np.uint8)
    stop = threading.Event()

    def fill(start: int) -> int:
        for index, path in enumerate(files[start : start + CHUNK], start):
            if stop.is_set():
                break
            image = read(path)
            if image.shape != first.shape:
                raise ConfigError(
                    f"{for_terminal(path)}: is {image.shape[1]}x{image.shape[0]} (width x height), but "
                    f"{for_terminal(files[0])} is {first.shape[1]}x{first.shape[0]}; all images must be of "
                    f"one size, or give dataset.image_size, to which they are scaled."
                )
            images[index] = image
        return min(CHUNK, len(files) - start)

    # Pillow decodes without Python's lock; for small images the time is in Python: at 32x32 two
    # threads were measured to take twice as long as one
    with Image.open(files[0]) as image:
        threads = 1 if image.width * image.height < SMALL else min(16, os.cpu_count() or 1)
    hidden = hide_progress_bar()
    if hidden:
        print(f"{description}: {len(files):,} images", file=sys.stderr)
    with (
        tqdm(total=len(files), desc=description, unit=" images", disable=hidden) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        try:
            for done in pool.map(fill, range(0, len(files), CHUNK)):
                bar.update(done)
        except BaseException:  # a signal too: Slurm waits half a minute for the end
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return torch.from_numpy(images)


def decode_cached(
    root: Path, listing: Listing, size: tuple[int, int] | None, channels: int, cache_dir: Path
) -> dict[str, Tensor]:
    """Decode the images of a listing, or take them from `cache_dir` if nothing has changed since.

    A cache belongs to a folder and its options, and holds the fingerprint of what it was made from. The
    decoded images are mapped from the file, so that runs side by side share its memory.

    Returns:
        uint8 [N, H, W, C] for each split.

    Raises:
        ConfigError: see `decode`.
    """
    key = hashlib.sha256(repr((str(root.resolve()), size, channels)).encode("utf-8", "surrogateescape"))
    path = cache_dir / f"{key.hexdigest()[:32]}.pt"
    stamp = f"{CACHE_VERSION} {listing.fingerprint}"
    images = _load(path, stamp)
    if images is None:
        images = {
            split: decode(files, size, channels, f"Decoding {root / split}")
            for split, files in listing.files.items()
        }
        shapes = {split: tuple(part.shape[1:3]) for split, part in images.items()}
        if len(set(shapes.values())) > 1:
            raise ConfigError(
                f"{root}: images differ in size (height, width) between the splits: {shapes}; give "
                f"dataset.image_size, to which they are scaled."
            )
        _save(path, {"stamp": stamp, "images": images})
    return images


def _load(path: Path, stamp: str) -> dict[str, Tensor] | None:
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
    return cached["images"] if cached["stamp"] == stamp else None


def _save(path: Path, content: dict[str, Any]) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.stem}-*"):  # left over from a process that was killed
            with suppress(FileNotFoundError):  # another process has just removed or renamed it
                if left.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                    left.unlink()
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}-", delete=False) as file:
            temporary = Path(file.name)
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)  # atomic, also when several runs decode at once
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        log.warning(
            "dataset.cache_dir=%s: cannot be written (%s); the next run decodes again.", path.parent, error
        )
    finally:  # also after a signal
        if temporary is not None:
            temporary.unlink(missing_ok=True)
