"""Folders of images that are decoded into memory, and kept in a cache that others can read."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import folders_of_images
from PIL import Image

from okddip.data.sources import Source, image_folder
from okddip.errors import ConfigError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes with eight images of 16x16 in each split."""
    folders_of_images(tmp_path / "images", "cat", "dog", seed=0)
    return tmp_path / "images"


def load(root: Path, **options: object) -> Source:
    return image_folder(str(root), str(root.parent / "cache"), **options)  # type: ignore[arg-type]


def test_all_files_that_cannot_be_read_are_named_at_once(root: Path) -> None:
    bad = [
        root / "train" / "cat" / "0.png",
        root / "train" / "dog" / "5.png",
        root / "test" / "dog" / "7.png",
    ]
    for path in bad:
        path.write_bytes(b"no image")
    Image.new("RGB", (9, 16)).save(root / "test" / "cat" / "3.png")
    with pytest.raises(ConfigError) as refusal:
        load(root)
    first, *named = str(refusal.value).splitlines()
    assert first == f"dataset.root={root}: 4 things are wrong:"
    places = [
        "train/cat/0.png: is not",
        "train/dog/5.png: is not",
        "test/cat/3.png: is 9x16",
        "test/dog/7.png: is not",
    ]
    for place, line in zip(places, named, strict=True):
        assert f"{root}/{place}" in line


def test_of_many_bad_files_all_are_counted(root: Path) -> None:
    for path in root.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ConfigError, match="32 things are wrong, of which the first 20 are") as refusal:
        load(root)
    assert len(str(refusal.value).splitlines()) == 21


def test_where_many_images_differ_in_size_not_all_are_decoded(root: Path) -> None:
    for number in range(30):
        Image.new("RGB", (17, 16)).save(root / "train" / "cat" / f"more{number}.png")
    with pytest.raises(ConfigError) as refusal:
        load(root)
    assert f"Decoding {root}/train: after 20 images of another size the rest was not" in str(refusal.value)
    assert "train/cat/more0.png: is 17x16" in str(refusal.value)


@pytest.fixture
def shared_umask() -> Iterator[None]:
    before = os.umask(0o002)
    yield
    os.umask(before)


@pytest.mark.usefixtures("shared_umask")
def test_the_cache_can_be_read_by_those_whom_the_umask_lets(root: Path) -> None:
    load(root)
    [cache] = (root.parent / "cache").glob("*.pt")
    assert stat.S_IMODE(cache.stat().st_mode) == 0o664


def make_16_bits(root: Path, brightest: int) -> None:
    for path in root.rglob("*.png"):
        Image.fromarray(np.full((16, 16), 100, dtype=np.uint16)).save(path)
    values = np.full((16, 16), brightest, dtype=np.uint16)
    Image.fromarray(values).save(root / "test" / "dog" / "7.png")


@pytest.mark.parametrize("brightest", [4095, 4096])
def test_16_bit_images_with_values_of_12_bits_are_warned_about(
    root: Path, brightest: int, caplog: pytest.LogCaptureFixture
) -> None:
    make_16_bits(root, brightest)
    for _ in range(2):  # also where they come out of the cache
        caplog.clear()
        load(root)
        if brightest < 4096:
            [message] = caplog.messages
            assert "no pixel of the 32 16-bit images is above 4095 of 65,535" in message
            assert "0 to 15 of 255" in message
        else:
            assert caplog.messages == []
