"""Preprocessing: how images of any kind become the pixels that a network takes."""

import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO, Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from okddip.data.augment import Normalization, normalization
from okddip.data.images import convert, read_image, scale_and_crop

OneImage = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | np.ndarray | Tensor
Images = OneImage | Iterable[OneImage]
ACCEPTED = (
    "a path, the bytes of an image file, a file open in binary mode (or io.BytesIO) or a PIL image; a list of"
    " these, or of uint8 arrays or tensors [H, W, C]; or one uint8 array or tensor [N, H, W, C]"
)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes what the network takes.

    Attributes:
        image_size: (height, width).
        channels: 3 (RGB) or 1 (grey).
        resize: pixels of the shorter side before an image is cropped at its centre; None: as few as cover the
            image size.
        mean, std: a number a channel, for pixels in [0, 1].
    """

    image_size: tuple[int, int]
    channels: int
    resize: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ValueError where one of them cannot be."""
        sizes = (*self.image_size, self.channels, *(() if self.resize is None else (self.resize,)))
        if not all(isinstance(size, int) and size > 0 for size in sizes) or len(self.image_size) != 2:
            raise ValueError(f"image sizes and channels must be positive whole numbers, not {sizes}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean {self.mean} and std {self.std} must have {self.channels} numbers each")
        if not all(math.isfinite(number) for number in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} must be finite, and std {self.std} above 0")

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "Preprocessing":
        """From what JSON or a checkpoint keeps of one; other keys are ignored."""
        return cls(
            image_size=cast(tuple[int, int], tuple(values["image_size"])),
            channels=values["channels"],
            resize=values.get("resize"),
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
        )

    def plain(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)

    def normalization(self) -> Normalization:
        """`(x / 255 - mean) / std` as one multiplication and one addition."""
        return normalization(self.mean, self.std, torch.device("cpu"))

    def pixels(self, images: Images) -> Tensor:
        """Images as uint8 [N, H, W, C] of the right size.

        Raises:
            ConfigError: a file is not an image.
            ValueError: an array of another type or shape.
            TypeError: none of `ACCEPTED`.
        """
        if isinstance(images, np.ndarray | Tensor):
            return self._checked(images, "images", "N, ")
        if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image) or hasattr(
            images, "read"
        ):
            images = [cast(OneImage, images)]
        if not isinstance(images, Iterable):
            raise TypeError(f"images must be {ACCEPTED}; not {type(images).__name__}.")
        pixels = [self._pixels_of_one(image, f"image {number}") for number, image in enumerate(images)]
        if not pixels:
            return torch.empty(0, *self.image_size, self.channels, dtype=torch.uint8)
        return torch.stack(pixels)

    def _checked(self, pixels: np.ndarray | Tensor, name: str, batch: str = "") -> Tensor:
        """Arrays are taken as they are: of the type and size that the network takes."""
        shape = (*self.image_size, self.channels)
        type_name = str(pixels.dtype).removeprefix("torch.")
        dimensions = len(shape) + bool(batch)
        if type_name != "uint8" or pixels.ndim != dimensions or tuple(pixels.shape[-3:]) != shape:
            raise ValueError(
                f"{name} must be uint8 [{batch}{', '.join(map(str, shape))}], not {type_name}"
                f" {list(pixels.shape)}; files and PIL images of any size are scaled."
            )
        return torch.tensor(pixels) if isinstance(pixels, np.ndarray) else pixels

    def _pixels_of_one(self, image: OneImage, name: str) -> Tensor:
        """[H, W, C]; files and PIL images are scaled as the data sets scale."""
        if isinstance(image, np.ndarray | Tensor):
            return self._checked(image, name).cpu()
        if isinstance(image, Image.Image):
            upright = convert(image, self.channels)
        elif isinstance(image, str | os.PathLike):
            upright = read_image(os.fsdecode(image), self.channels)
        else:
            upright = read_image(content(image, name), self.channels, getattr(image, "name", name))
        height, width = self.image_size
        if self.resize is not None:
            upright = scale_and_crop(upright, self.resize, self.image_size)
        elif upright.size != (width, height):
            upright = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(upright).reshape(height, width, self.channels))


def content(image: object, name: str) -> bytes:
    """What an image file contains that is given as bytes or open, which is read from its beginning.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if not hasattr(image, "read"):
        raise TypeError(f"{name} is of type {type(image).__name__}; images must be {ACCEPTED}.")
    with suppress(AttributeError, OSError):  # an answer of a web server has no beginning to go back to
        image.seek(0)  # type: ignore[attr-defined]
    found = image.read()
    if not isinstance(found, bytes):
        raise TypeError(f"{name} is a file that is open as text; open it in binary mode: open(path, 'rb').")
    return found
