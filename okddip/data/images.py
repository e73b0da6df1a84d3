"""Image files: read whatever their format, converted to 8 bits in RGB or grey, scaled."""

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, features

from okddip.data.metadata import upright, without_metadata
from okddip.errors import ConfigError
from okddip.text import for_terminal

# that Pillow may read; its other readers are slow, rare or start other programs
FORMATS = ["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM"]
if "avif" in features.modules and features.check_module("avif"):  # since Pillow 11.3, if built with it
    FORMATS.append("AVIF")
# Pillow warns of damaged metadata, which cost an image nothing, with a line of its own code
warnings.filterwarnings("ignore", message="Corrupt EXIF data", module="PIL")
MOST_ELONGATED = 16  # of the sides of an image that is scaled whole
BRIGHTEST = "brightest"  # in an image's `info`: of a 16-bit image, the largest value before it is scaled


def read_image(file: str | bytes, channels: int = 3, name: object = None) -> Image.Image:
    """Read a file as an upright 8-bit image in RGB, or in grey for one channel; see `convert`.

    Of an animation the first frame is read. Metadata that are damaged do not matter.

    Args:
        file: a path, or what a file contains.
        channels: 3 or 1.
        name: what messages call it; by default the path.

    Raises:
        ConfigError: names the file and says why it cannot be read.
    """
    name = for_terminal(file if name is None else name)
    try:
        return _decoded(file, channels)
    except Image.UnidentifiedImageError as error:
        raise ConfigError(
            f"{name}: is not an image, or its beginning is damaged (known formats:"
            f" {', '.join(FORMATS)}); remove or replace it."
        ) from error
    # damaged files make Pillow's readers raise SyntaxError, struct.error, zlib.error...
    except Exception as error:
        raise ConfigError(f"{name}: cannot be decoded ({error}); remove or replace it.") from error


def _decoded(file: str | bytes, channels: int) -> Image.Image:
    try:
        return _open(BytesIO(file) if isinstance(file, bytes) else file, channels)
    except Exception as error:
        try:
            content = file if isinstance(file, bytes) else Path(file).read_bytes()
            return _open(BytesIO(without_metadata(content)), channels)
        except Exception:
            raise error from None  # of the file as it is


def _open(file: str | BytesIO, channels: int) -> Image.Image:
    with Image.open(file, formats=FORMATS) as image:
        # Pillow itself only warns up to twice its limit
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels are too many")
        image.load()
        return convert(image, channels)


def convert(image: Image.Image, channels: int) -> Image.Image:
    """An upright 8-bit image in RGB, or in grey for one channel.

    16-bit grey is scaled to 8 bits, transparency is laid on black (as crops are padded with black), palettes
    and other colour spaces are converted, and photos are turned as their orientation says.

    Raises:
        ValueError: the pixels' range is unknown.
    """
    image = upright(image)
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
    scaled = Image.fromarray((values // 257).astype(np.uint8))
    scaled.info[BRIGHTEST] = int(values.max())
    return scaled


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
