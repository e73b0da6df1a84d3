"""Preprocessing: how images of any kind become the pixels that a network takes."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from okddip.data.augment import Normalization, normalization
from okddip.data.images import convert, read_image, scale_and_crop

# a file, an image, several of them, or uint8 pixels [N, H, W, C]
Images = str | Path | Image.Image | Sequence[str | Path | Image.Image] | np.ndarray | Tensor


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
        """
        if isinstance(images, np.ndarray | Tensor):
            shape = (*self.image_size, self.channels)
            type_name = str(images.dtype).removeprefix("torch.")
            if type_name != "uint8" or images.ndim != 4 or tuple(images.shape[1:]) != shape:
                raise ValueError(
                    f"images must be uint8 [N, {', '.join(map(str, shape))}], not {type_name}"
                    f" {list(images.shape)}; files and PIL images of any size are scaled."
                )
            return torch.tensor(images) if isinstance(images, np.ndarray) else images
        several = [images] if isinstance(images, str | Path | Image.Image) else list(images)
        if not several:
            return torch.empty(0, *self.image_size, self.channels, dtype=torch.uint8)
        return torch.stack([self._pixels_of_one(image) for image in several])

    def _pixels_of_one(self, image: str | Path | Image.Image) -> Tensor:
        """[H, W, C], scaled as the data sets scale."""
        upright = (
            convert(image, self.channels)
            if isinstance(image, Image.Image)
            else read_image(str(image), self.channels)
        )
        height, width = self.image_size
        if self.resize is not None:
            upright = scale_and_crop(upright, self.resize, self.image_size)
        elif upright.size != (width, height):
            upright = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(upright).reshape(height, width, self.channels))
