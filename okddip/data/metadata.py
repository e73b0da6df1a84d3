"""What a picture file says beside its pixels: damage there costs no image.

Pillow reads all of a file, and raises for a wrong checksum of a comment as for one of the pixels. What it
refuses is tried again with nothing but what the pixels need.
"""

import zlib
from collections.abc import Iterator
from typing import Literal

from PIL import ExifTags, Image

PNG, JPEG, TIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", (b"II*\0", b"MM\0*")
PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
PNG_TRUSTED = (b"tRNS", b"eXIf")  # transparency and orientation, if their checksum is right
JPEG_ADOBE, JPEG_ADOBE_LENGTH = 0xEE, 12  # says which colours the components are
# sizes, bits, compression, colours, strips, tiles, palette, the tables of JPEG inside TIFF
TIFF_PIXELS = {
    *(256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325),
    *(332, 334, 338, 339, 347),
    *range(512, 533),
}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF or XMP data say; as it is, if they cannot be read.

    Pillow's `exif_transpose` also writes what it has read, and fails where there is one bad number.
    """
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged data make Pillow's readers raise struct.error, SyntaxError, ValueError...
        return image
    return image if turn is None else image.transpose(turn)


def without_metadata(content: bytes) -> bytes:
    """The content of a PNG, JPEG, TIFF or AVIF file without what its pixels do not need.

    The orientation stays, where it can be told. Other files are returned as they are.
    """
    if content.startswith(PNG):
        return PNG + b"".join(_png_chunks(content))
    if content.startswith(JPEG):
        return content[:2] + b"".join(_jpeg_segments(content))
    if content.startswith(TIFF):
        return _tiff_pixels(content)
    if content[4:8] == b"ftyp":  # AVIF: decoders pass over items of a type that they do not know
        end = content.find(b"mdat")
        return content[:end].replace(b"Exif", b"none") + content[end:]
    return content


def _png_chunks(content: bytes) -> Iterator[bytes]:
    """What to keep of a PNG: length, type, data and checksum of each chunk."""
    start = len(PNG)
    while start < len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4])
        chunk = content[start:end]
        kind = chunk[4:8]
        is_right = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if kind in PNG_PIXELS or (kind in PNG_TRUSTED and is_right):
            yield chunk
        start = end


def _jpeg_segments(content: bytes) -> Iterator[bytes]:
    """What to keep of a JPEG: marker, length and data of each segment, and from the first scan on all."""
    start = 2
    while content[start : start + 1] == b"\xff" and content[start + 1] != 0xDA:
        marker = content[start + 1]
        end = start + 2 + int.from_bytes(content[start + 2 : start + 4])
        segment = content[start:end]
        is_orientation = segment[4:10] == b"Exif\0\0"
        is_adobe = marker == JPEG_ADOBE and end - start - 4 >= JPEG_ADOBE_LENGTH
        if is_orientation or is_adobe or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            yield segment
        start = end
    yield content[start:]


def _tiff_pixels(content: bytes) -> bytes:
    """A TIFF whose first directory has the tags of `TIFF_PIXELS` only; nothing else moves."""
    order: Literal["little", "big"] = "little" if content.startswith(b"II") else "big"

    def number(start: int, size: int) -> int:
        return int.from_bytes(content[start : start + size], order)

    directory = number(4, 4)
    end = directory + 2 + 12 * number(directory, 2)
    entries = [content[start : start + 12] for start in range(directory + 2, end, 12)]
    kept = [entry for entry in entries if int.from_bytes(entry[:2], order) in TIFF_PIXELS]
    table = len(kept).to_bytes(2, order) + b"".join(kept) + bytes(4)
    return content[:directory] + table + content[directory + len(table) :]
