"""Folders of images, good and bad."""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from okddip.data import decoding
from okddip.data.folder import scan
from okddip.data.images import read_image, scale_and_crop
from okddip.data.sources import Source, image_folder
from okddip.errors import ConfigError
from okddip.signals import stop_on_signals

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def picture(size: tuple[int, int] = (8, 6), seed: int = 0) -> Image.Image:
    """Noise of the given (width, height)."""
    pixels = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes with three images each in train, and one in test."""
    for split, count in (("train", 3), ("test", 1)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                picture(seed=10 * label + number).save(tmp_path / "images" / split / name / f"{number}.png")
    return tmp_path / "images"


def load(root: Path, **options: object) -> Source:
    return image_folder(str(root), str(root.parent / "cache"), **options)  # type: ignore[arg-type]


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths decoded from now on."""
    paths: list[str] = []

    def spy(path: str, channels: int = 3) -> Image.Image:
        paths.append(path)
        return read_image(path, channels)

    monkeypatch.setattr(decoding, "read_image", spy)
    return paths


def test_images_and_labels_are_those_of_the_files(root: Path) -> None:
    source = load(root)
    assert source.classes == ("cat", "dog")
    assert source.train.images.shape == (6, 6, 8, 3)
    assert source.train.images.dtype == torch.uint8
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.test.labels.tolist() == [0, 1]
    for index, seed in enumerate((0, 1, 2, 10, 11, 12)):
        assert np.array_equal(source.train.images[index].numpy(), np.asarray(picture(seed=seed)))


# The cache


def test_the_second_start_decodes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(root)
    paths = decoded(monkeypatch)
    second = load(root)
    assert paths == []
    for before, after in zip(first[:2], second[:2], strict=True):
        assert torch.equal(before.images, after.images)
        assert torch.equal(before.labels, after.labels)


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "rewritten"])
def test_a_changed_folder_is_noticed(root: Path, change: str) -> None:
    before = load(root)
    file = root / "train" / "cat" / "1.png"
    if change == "added":
        picture(seed=5).save(root / "train" / "cat" / "5.png")
    elif change == "removed":
        file.unlink()
    elif change == "renamed":
        file.rename(file.with_name("9.png"))
    else:
        stamp = file.stat()
        picture(seed=99).save(file)
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    after = load(root)
    assert not torch.equal(before.train.images, after.train.images)


def test_each_set_of_options_has_a_cache_of_its_own(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(root)
    assert load(root, image_size=4).train.images.shape == (6, 4, 4, 3)
    assert load(root, channels=1).train.images.shape == (6, 6, 8, 1)
    paths = decoded(monkeypatch)
    assert load(root).train.images.shape == (6, 6, 8, 3)
    assert load(root, image_size=4).train.images.shape == (6, 4, 4, 3)
    assert paths == []


def test_runs_that_begin_together_decode_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(*arguments: Any) -> Any:
        with (root.parent / "decoded").open("a") as log:
            log.write(f"{arguments[3]}\n")
        time.sleep(0.5)
        return decode(*arguments)

    def run() -> None:
        sys.exit(load(root).train.images.shape != (6, 6, 8, 3))

    decode = decoding.decode
    monkeypatch.setattr(decoding, "decode", slowly)
    processes = [multiprocessing.get_context("fork").Process(target=run) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len((root.parent / "decoded").read_text().splitlines()) == 2  # train and test


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "zeros"])
def test_a_damaged_cache_is_made_anew(root: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    first = load(root)
    (cache,) = (root.parent / "cache").glob("*.pt")
    content = cache.read_bytes()
    cache.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "garbage": b"no cache" * 99,
            "empty": b"",
            "zeros": content.replace(first.train.images[0].numpy().tobytes(), bytes(8 * 8 * 3)),
        }[damage]
    )
    assert cache.read_bytes() != content
    assert torch.equal(load(root).train.images, first.train.images)
    assert "decoding the images again" in caplog.text
    assert len(cache.read_bytes()) == len(content)


def test_a_cache_folder_that_cannot_be_written_is_warned_about(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root.parent / "file").write_text("in the way")
    source = image_folder(str(root), str(root.parent / "file" / "cache"))
    assert len(source.train.labels) == 6
    assert "dataset.cache_dir=" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stop_while_a_cache_is_written_costs_no_room(
    root: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(content: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        file.flush()  # type: ignore[attr-defined]
        time.sleep(60)

    def write() -> None:
        monkeypatch.setattr(torch, "save", half)
        with stop_on_signals():
            load(root)

    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    cache = root.parent / "cache"
    while not any(path.stat().st_size for path in cache.glob(".*")):
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid or 0, number)
    process.join()
    for left in cache.glob(".*"):
        assert number == signal.SIGKILL
        os.utime(left, (0, 0))  # long ago: another process may be writing what is new
    load(root)
    assert [path.suffix for path in cache.iterdir() if not path.name.startswith("locks-")] == [".pt"]


def test_a_full_disk_leaves_no_half_written_cache(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(content: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert len(load(root).train.labels) == 6
    assert "No space left on device" in caplog.text
    assert [path.name for path in (root.parent / "cache").iterdir()] == [f"locks-{os.getuid()}"]


# Images that are read


def test_images_are_scaled_and_cropped_to_the_size_asked_for(root: Path) -> None:
    wide = Image.new("RGB", (20, 10), RED)
    wide.paste(GREEN, (5, 0, 15, 10))  # the square in the middle
    wide.save(root / "train" / "cat" / "0.png")
    image = load(root, image_size=5).train.images[0]
    assert image.shape == (5, 5, 3)
    assert (image[:, 1:4] == torch.tensor(GREEN, dtype=torch.uint8)).all()
    assert image[..., 1].min() > 200  # at the edges the filter reaches beyond the crop


@pytest.mark.parametrize("seed", range(20))
def test_scaling_and_cropping_is_torchvisions(seed: int) -> None:
    rng = random.Random(seed)
    image = picture((rng.randint(20, 200), rng.randint(20, 200)), seed)
    shorter = rng.randint(16, 80)
    size = rng.randint(1, shorter)
    expected = v2.CenterCrop(size)(v2.Resize(shorter)(image))
    assert np.array_equal(np.asarray(scale_and_crop(image, shorter, (size, size))), np.asarray(expected))


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (3_000, 20)])
def test_of_a_very_long_image_the_middle_is_kept(root: Path, size: tuple[int, int]) -> None:
    width, height = size
    image = Image.new("RGB", size, RED)
    middle = (0, height // 2 - 100, width, height // 2 + 100)
    if width > height:
        middle = (width // 2 - 100, 0, width // 2 + 100, height)
    image.paste(GREEN, middle)
    assert scale_and_crop(image, 256, (224, 224)).getcolors() == [(224 * 224, GREEN)]
    image.save(root / "train" / "cat" / "0.png")  # images in memory are cropped before they are scaled
    assert (load(root, image_size=16).train.images[0] == torch.tensor(GREEN, dtype=torch.uint8)).all()


def with_transparency() -> Image.Image:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    return image


def with_palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([*BLUE, *GREEN])
    image.putpixel((1, 0), 1)
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (2, 1), 7), [(7, 7, 7)] * 2),
        (Image.new("1", (2, 1), 1), [(255, 255, 255)] * 2),
        (Image.new("LA", (2, 1), (90, 255)), [(90, 90, 90)] * 2),
        (with_transparency(), [RED, (0, 0, 0)]),
        (with_palette(), [BLUE, GREEN]),
        (Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)), [(0, 0, 0), (255, 255, 255)]),
        (Image.fromarray(np.array([[257 * 3, 257 * 200]], dtype=np.uint16)), [(3, 3, 3), (200, 200, 200)]),
    ],
    ids=[
        "grey",
        "black and white",
        "grey with alpha",
        "RGBA",
        "palette",
        "16 bit black, white",
        "16 bit grey",
    ],
)
def test_every_kind_of_image_becomes_rgb(
    tmp_path: Path, image: Image.Image, expected: list[tuple[int, ...]]
) -> None:
    image.save(tmp_path / "image.png")
    pixels = np.asarray(read_image(str(tmp_path / "image.png")))
    assert pixels.dtype == np.uint8
    assert pixels[0].tolist() == [list(pixel) for pixel in expected]


def test_a_palette_with_a_transparent_colour_is_laid_on_black(tmp_path: Path) -> None:
    with_palette().save(tmp_path / "image.png", transparency=1)
    assert np.asarray(read_image(str(tmp_path / "image.png")))[0].tolist() == [list(BLUE), [0, 0, 0]]


def test_16_bit_grey_with_a_transparent_value_is_laid_on_black(tmp_path: Path) -> None:
    values = np.array([[257 * 200, 257 * 200 + 1, 257 * 3]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "image.png", transparency=257 * 200)
    pixels = np.asarray(read_image(str(tmp_path / "image.png"), channels=1))
    assert pixels[0].tolist() == [0, 200, 3]


def test_cmyk_jpegs_are_converted(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "image.jpg")
    assert np.asarray(read_image(str(tmp_path / "image.jpg"))).min() >= 254


def test_a_photo_is_turned_as_its_camera_was_held(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 16), RED)
    image.paste(BLUE, (16, 0, 32, 16))  # right half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "image.jpg", exif=exif, quality=95)
    upright = read_image(str(tmp_path / "image.jpg"))
    assert upright.size == (16, 32)
    assert upright.getpixel((8, 4))[0] > 200  # type: ignore[index]  # what was left is above
    assert upright.getpixel((8, 28))[2] > 200  # type: ignore[index]


def test_hidden_files_and_folders_are_ignored(root: Path) -> None:
    for hidden in (".DS_Store", "train/.DS_Store", "train/cat/.DS_Store", "test/dog/._0.png"):
        (root / hidden).write_text("no image")
    (root / "train" / ".thumbnails").mkdir()
    assert len(load(root).train.labels) == 6


def test_links_are_followed(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (root / "train" / "cat").rename(outside)
    (root / "train" / "cat").symlink_to(outside)
    (root / "train" / "dog" / "3.png").symlink_to(outside / "0.png")
    source = load(root)
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert torch.equal(source.train.images[0], source.train.images[6])


def test_class_names_may_have_spaces_and_any_script(root: Path) -> None:
    names = ("ice cream", "mañana", "Ünicorn", "猫", "القط")
    for split in ("train", "test"):
        for name in names:
            (root / split / name).mkdir()
            picture().save(root / split / name / "a picture.png")
    source = load(root)
    assert source.classes == tuple(sorted(("cat", "dog", *names)))
    assert len(source.test.labels) == 7


def test_a_class_name_that_is_no_text_is_refused(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(ConfigError, match=r"the class b'caf\\xe9' has a name that is not UTF-8; rename it"):
        load(root)


def test_a_folder_is_known_by_another_path_to_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(root)
    paths = decoded(monkeypatch)
    monkeypatch.chdir(root)
    image_folder("../images", str(root.parent / "cache"))
    assert paths == []


def test_a_signal_breaks_decoding_off_at_the_next_image(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread has many files to decode, which takes minutes where they are large photos."""
    for number in range(100):
        picture(seed=number).save(root / "train" / "cat" / f"more{number}.png")
    read = decoding.read_image
    paths: list[str] = []

    def interrupted(path: str, channels: int) -> Image.Image:
        paths.append(path)
        if len(paths) == 10:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return read(path, channels)

    monkeypatch.setattr(decoding, "read_image", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    try:
        with pytest.raises(KeyboardInterrupt):
            load(root)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(paths) < 50


def test_a_class_may_have_one_image(root: Path) -> None:
    for number in (1, 2):
        (root / "train" / "cat" / f"{number}.png").unlink()
    assert load(root).train.labels.tolist() == [0, 1, 1, 1]


# What is refused, by name


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: there is no such folder"):
        load(tmp_path / "nowhere")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(ConfigError, match=r"images/train: cannot be listed \(No such file"):
        load(tmp_path / "images")


def test_an_empty_split_is_refused(root: Path) -> None:
    for name in ("cat", "dog"):
        (root / "test" / name / "0.png").unlink()
        (root / "test" / name).rmdir()
    with pytest.raises(ConfigError, match=r"images/test: is empty; expected"):
        load(root)


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_class_is_refused(root: Path, split: str) -> None:
    for file in (root / split / "dog").iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match=f"{split}/dog: is empty"):
        load(root)


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
def test_a_class_in_one_split_only_is_refused(root: Path, split: str, other: str) -> None:
    (root / split / "emu").mkdir()
    picture().save(root / split / "emu" / "0.png")
    with pytest.raises(ConfigError, match=f"class 'emu' has no folder in .*/{other}"):
        load(root)


def test_a_file_among_the_classes_is_refused(root: Path) -> None:
    picture().save(root / "train" / "stray.png")
    with pytest.raises(ConfigError, match=r"train/stray\.png: is not a folder"):
        load(root)


def test_a_folder_among_the_images_is_refused(root: Path) -> None:
    (root / "train" / "cat" / "more").mkdir()
    with pytest.raises(ConfigError, match="train/cat/more: is not a file"):
        load(root)


def test_a_broken_link_is_refused(root: Path) -> None:
    (root / "train" / "cat" / "3.png").symlink_to(root / "gone.png")
    with pytest.raises(ConfigError, match=r"train/cat/3\.png: cannot be read \(No such file"):
        load(root)


@pytest.mark.parametrize("place", ["train/cat/3.png", "train/emu"])
def test_a_link_to_itself_is_refused(root: Path, place: str) -> None:
    (root / place).symlink_to(root / place)
    with pytest.raises(ConfigError, match=rf"{place}: (cannot be read|is not a folder)"):
        load(root)


def test_a_link_to_a_folder_above_is_refused(root: Path) -> None:
    (root / "train" / "cat" / "all").symlink_to(root)
    with pytest.raises(ConfigError, match="train/cat/all: is not a file"):
        load(root)


def test_an_image_of_another_size_is_refused(root: Path) -> None:
    picture((9, 6)).save(root / "train" / "dog" / "1.png")
    with pytest.raises(ConfigError, match=r"dog/1\.png: is 9x6 .*0\.png is 8x6.*image_size"):
        load(root)


def test_splits_of_different_sizes_are_refused(root: Path) -> None:
    for name in ("cat", "dog"):
        picture((9, 6)).save(root / "test" / name / "0.png")
    with pytest.raises(ConfigError, match=r"differ in size .* between the splits"):
        load(root)


def image_bytes(tmp_path: Path, suffix: str) -> bytes:
    picture((64, 64)).save(tmp_path / f"whole{suffix}")
    return (tmp_path / f"whole{suffix}").read_bytes()


def bomb() -> bytes:
    """A PNG of a few bytes that claims to have 20,000 x 20,000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "kind",
    ["text", "zero bytes", "truncated png", "truncated jpeg", "corrupt png", "bomb", "small bomb", "float"],
)
def test_a_bad_file_is_refused_by_name(root: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "train" / "dog" / "2.png"
    whole = image_bytes(root.parent, ".png")
    corrupt = bytearray(whole)
    corrupt[len(whole) // 2] ^= 255
    content = {
        "text": b"Thumbnails of these images were made by hand.\n",
        "zero bytes": b"",
        "truncated png": whole[: len(whole) // 2],
        "truncated jpeg": image_bytes(root.parent, ".jpg")[:900],
        "corrupt png": bytes(corrupt),
        "bomb": bomb(),
        "small bomb": whole,
        "float": None,
    }[kind]
    if content is None:
        Image.fromarray(np.ones((6, 8), dtype=np.float32)).save(path, format="TIFF")
    else:
        path.write_bytes(content)
    if kind == "small bomb":  # between Pillow's limit, at which it warns, and twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with pytest.raises(ConfigError, match=r"train/dog/2\.png: (is not an image|cannot be decoded)"):
        load(root, image_size=8)


def test_a_bad_file_whose_name_is_not_utf8_can_be_logged(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    Path(path).write_text("no image")
    with pytest.raises(ConfigError, match=r"/caf\\xe9\.png: is not an image") as refusal:
        read_image(path)
    str(refusal.value).encode()


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it can still read
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".tif", ".webp", ".ppm"])
def test_damage_of_any_kind_is_either_read_or_refused(tmp_path: Path, suffix: str) -> None:
    whole = image_bytes(tmp_path, suffix)
    rng = random.Random(0)
    path = tmp_path / f"damaged{suffix}"
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 5, 50])):
            damaged[rng.randrange(len(damaged) if rng.random() < 0.5 else 60)] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        try:
            image = read_image(str(path))
        except ConfigError as error:
            message = str(error)
            assert message.startswith(f"{path}: ")
        else:
            assert image.mode == "RGB"


def test_more_images_than_memory_are_refused_before_they_are_decoded(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 10)
    with pytest.raises(ConfigError, match="GiB of memory, this machine has 0"):
        load(root)


def test_all_that_is_wrong_among_the_folders_is_said_at_once(root: Path) -> None:
    picture().save(root / "train" / "stray.png")
    (root / "train" / "cat" / "more").mkdir()
    (root / "test" / "emu").mkdir()
    (root / "test" / "dog" / "gone.png").symlink_to(root / "gone.png")
    with pytest.raises(ConfigError) as refusal:
        scan(root, ("train", "test"))
    message = str(refusal.value)
    assert message.startswith(f"dataset.root={root}: 5 things are wrong:\n")
    for said in (
        *("train/stray.png: is not a folder", "train/cat/more: is not a file", "test/emu: is empty"),
        *("class 'emu' has no folder in", "test/dog/gone.png: cannot be read (No such file"),
    ):
        assert message.count(said) == 1


def test_of_many_things_that_are_wrong_the_first_are_named_and_all_are_counted(root: Path) -> None:
    for number in range(1, 31):
        (root / "train" / f"class {number:02}").mkdir()
    with pytest.raises(ConfigError) as refusal:
        scan(root, ("train", "test"))
    first, *named = str(refusal.value).splitlines()
    assert first == f"dataset.root={root}: 60 things are wrong, of which the first 20 are:"
    assert len(named) == 20


def test_what_systems_and_archives_leave_is_ignored_and_counted(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = scan(root, ("train", "test"))
    caplog.set_level("INFO")
    for place in ("train", "test", "train/cat", "test/dog"):
        (root / place / "__MACOSX").mkdir()
        for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._0.png", "Icon\r"):
            (root / place / name).write_text("no image")
    after = scan(root, ("train", "test"))
    assert after.classes == before.classes
    assert after.files == before.files
    assert after.fingerprint == before.fingerprint
    [line] = caplog.messages
    assert line.startswith(f"{root}: ignored 24 hidden files and folders")
    assert line.endswith("(.DS_Store, ._0.png, Icon\\r, Thumbs.db, __MACOSX).")


def test_an_unreadable_folder_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match=r"images/train: cannot be listed \(Permission denied"):
        scan(root, ("train", "test"))
