"""Damage beside the pixels of an image costs nothing; its orientation is kept where it can be told."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import IFDRational

from okddip.data.images import FORMATS, read_image
from okddip.errors import ConfigError

TURN_CLOCKWISE = 6
needs_avif = pytest.mark.skipif("AVIF" not in FORMATS, reason="Pillow without AVIF")


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(16, 24, 3), dtype=np.uint8))


def exif() -> bytes:
    data = Image.Exif()
    data[ExifTags.Base.Orientation] = TURN_CLOCKWISE
    data[ExifTags.Base.XResolution] = IFDRational(72)
    return data.tobytes()


def saved(kind: str, **options: object) -> bytes:
    file = BytesIO()
    photo().save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(read_image(content, name="photo"))


def turned(content: bytes) -> np.ndarray:
    """The pixels of a file without metadata, turned clockwise."""
    return np.rot90(pixels(content), -1)


PLAIN = {kind: saved(kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF")}
# a rational of -1/0, which Pillow reads, and cannot write again
BAD_RATIONAL = (
    exif()
    .replace(struct.pack(">HH", 282, 5), struct.pack(">HH", 282, 10))
    .replace(struct.pack(">II", 72, 1), struct.pack(">iI", -1, 0))
)
BAD_EXIF = [exif()[:9], b"Exif\0\0no TIFF", b"Exif\0\0", exif()[:20]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_is_followed_beside_a_bad_number(kind: str) -> None:
    assert exif() != BAD_RATIONAL
    assert np.array_equal(pixels(saved(kind, exif=BAD_RATIONAL)), turned(PLAIN[kind]))


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the damage
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("data", BAD_EXIF)
def test_exif_data_that_cannot_be_read_leave_an_image_as_it_is(kind: str, data: bytes) -> None:
    assert np.array_equal(pixels(saved(kind, exif=data)), pixels(PLAIN[kind]))


def chunk(kind: bytes, data: bytes, *, checksum: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ checksum)


PNG_CHUNKS = {
    "eXIf": chunk(b"eXIf", exif()[6:20], checksum=1),
    "comment": chunk(b"tEXt", b"Comment\0by hand", checksum=1),
    "compressed comment": chunk(b"zTXt", b"Comment\0\x07what"),
    "text that is too long": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21))),
    "colour profile": chunk(b"iCCP", b"sRGB\0\x05what"),
    "gamma": chunk(b"gAMA", b"\0"),
    "resolution": chunk(b"pHYs", b"\0"),
    "transparency": chunk(b"tRNS", bytes(6), checksum=1),
    "animation": chunk(b"fcTL", b"\0"),
}


@pytest.mark.parametrize("damage", PNG_CHUNKS)
@pytest.mark.parametrize("place", [33, -12], ids=["before the pixels", "after them"])
def test_a_bad_chunk_of_a_png_costs_no_image(damage: str, place: int) -> None:
    plain = PLAIN["PNG"]
    assert np.array_equal(pixels(plain[:place] + PNG_CHUNKS[damage] + plain[place:]), pixels(plain))


def test_what_is_whole_beside_a_bad_chunk_of_a_png_counts() -> None:
    oriented = saved("PNG", exif=exif())
    assert np.array_equal(pixels(oriented[:33] + PNG_CHUNKS["comment"] + oriented[33:]), turned(PLAIN["PNG"]))
    transparent = saved("PNG", transparency=photo().getpixel((0, 0)))
    assert pixels(transparent[:33] + PNG_CHUNKS["gamma"] + transparent[33:])[0, 0].tolist() == [0, 0, 0]


def segment(marker: int, data: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


# without the number of pictures
MULTI_PICTURE = b"MPF\0II*\0" + struct.pack("<IHHHI4sI", 8, 1, 45056, 7, 4, b"0100", 0)
JPEG_SEGMENTS = {
    "JFIF": segment(0xE0, b"JFIF\0\1"),
    "several pictures": segment(0xE2, MULTI_PICTURE),
    "Adobe": segment(0xEE, b"Adobe"),
    "Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\0\1"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", JPEG_SEGMENTS)
def test_a_bad_segment_of_a_jpeg_costs_neither_image_nor_orientation(damage: str) -> None:
    oriented = saved("JPEG", exif=exif())
    assert np.array_equal(pixels(oriented[:2] + JPEG_SEGMENTS[damage] + oriented[2:]), turned(PLAIN["JPEG"]))


@pytest.mark.filterwarnings("ignore")
def test_a_cmyk_jpeg_keeps_its_colours_beside_a_bad_segment() -> None:
    file = BytesIO()
    photo().convert("CMYK").save(file, "JPEG")
    whole = file.getvalue()
    damaged = whole[:2] + JPEG_SEGMENTS["several pictures"] + whole[2:]
    assert np.array_equal(pixels(damaged), pixels(whole))


@pytest.mark.filterwarnings("ignore")
def test_a_bad_tag_of_a_tiff_costs_no_image() -> None:
    plain = saved("TIFF", tiffinfo={270: "a description", 700: b"<xmp/>"})
    description, xmp = (plain.index(struct.pack("<HH", tag, kind)) for tag, kind in ((270, 2), (700, 1)))
    outside = plain[: description + 8] + struct.pack("<I", 2**29) + plain[description + 12 :]
    as_text = plain[: xmp + 2] + struct.pack("<H", 2) + plain[xmp + 4 :]
    for damaged in (outside, as_text):
        assert np.array_equal(pixels(damaged), pixels(plain))


@needs_avif
def test_bad_exif_data_cost_no_avif_image() -> None:
    whole = saved("AVIF", exif=exif(), speed=10)
    assert pixels(whole).shape == (24, 16, 3)  # turned
    start = whole.index(b"MM\0*")
    damaged = whole[:start] + b"no TIFF!" + whole[start + 8 :]
    assert np.array_equal(pixels(damaged), pixels(whole))


@needs_avif
def test_avif_is_read_like_any_other_format(tmp_path: Path) -> None:
    (tmp_path / "photo.avif").write_bytes(saved("AVIF", quality=100, subsampling="4:4:4", speed=10))
    difference = np.asarray(read_image(str(tmp_path / "photo.avif"))).astype(int) - np.asarray(photo())
    assert abs(difference).max() <= 8


@pytest.mark.parametrize("kind", PLAIN)
def test_pixels_that_are_damaged_are_refused_as_before(kind: str) -> None:
    content = PLAIN[kind]
    with pytest.raises(ConfigError, match=r"photo: (is not an image|cannot be decoded)"):
        pixels(content[: len(content) // 2])
