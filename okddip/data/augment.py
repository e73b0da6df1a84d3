"""Random crop, flip and normalisation of a whole batch at once, on the device where the images are.

Drawing is separate from augmenting: only `draw` takes a generator, so that a batch can be drawn once for all
ranks and `augment` can be tested on any device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Draws(NamedTuple):
    """Random choices for B images: where the crop begins, and whether it is flipped."""

    top: Tensor  # [B] int64, 0 ... 2 * pad
    left: Tensor  # [B] int64, 0 ... 2 * pad
    flip: Tensor  # [B] bool


class Normalization(NamedTuple):
    """`(x / 255 - mean) / std` of uint8 images as one multiplication and one addition."""

    scale: Tensor  # [C, 1, 1]
    shift: Tensor  # [C, 1, 1]


def normalization(mean: Sequence[float], std: Sequence[float], device: torch.device) -> Normalization:
    """The constants of `normalize` for the mean and standard deviation of pixels in [0, 1]."""
    mean_, std_ = (torch.tensor(list(values), dtype=torch.float64)[:, None, None] for values in (mean, std))
    return Normalization(*(x.to(device, torch.float32) for x in (1 / (255 * std_), -mean_ / std_)))


def draw(batch: int, generator: torch.Generator, pad: int, flip: bool) -> Draws:
    """Draw crops and flips for a batch on the generator's device.

    Consumes the same random numbers for any `pad` and `flip`.
    """
    device = generator.device
    top, left = torch.randint(2 * pad + 1, (2, batch), generator=generator, device=device)
    coin = torch.rand(batch, generator=generator, device=device) < 0.5
    return Draws(top, left, coin if flip else torch.zeros_like(coin))


def augment(
    images: Tensor,
    draws: Draws,
    constants: Normalization,
    pad: int,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Pad with black, crop at the drawn places, flip and normalise.

    As torchvision's `RandomCrop(size, padding=pad)`, `RandomHorizontalFlip`, `ToTensor` and `Normalize`
    do image by image.

    Args:
        images: uint8 [B, H, W, C].
        draws: as drawn by `draw` with the same `pad`, on the images' device.
        constants: see `normalization`.
        memory_format: of the result.

    Returns:
        float32 [B, C, H, W].
    """
    batch, height, width, channels = images.shape
    device = images.device
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))  # [B, H + 2 pad, W + 2 pad, C]
    rows = draws.top[:, None] + torch.arange(height, device=device)  # [B, H]
    columns = torch.arange(width, device=device)
    columns = torch.where(draws.flip[:, None], width - 1 - columns, columns)  # [B, W]
    columns = draws.left[:, None] + columns  # [B, W]

    # Crop and flip in one gather of whole pixels: on CPUs twice as fast as advanced indexing with
    # (image, row, column), and free of the where(flip, mirrored, plain) that computes both.
    first = torch.arange(batch, device=device)[:, None] * padded.shape[1]  # [B, 1]
    rows = (first + rows) * padded.shape[2]  # [B, H]
    pixels = rows[:, :, None] + columns[:, None, :]  # [B, H, W]
    crops = padded.view(-1, channels).index_select(0, pixels.view(-1)).view(images.shape)
    return normalize(crops, constants, memory_format)


def normalize(
    images: Tensor, constants: Normalization, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """uint8 [B, H, W, C] to normalised float32 [B, C, H, W] in the given memory format."""
    images = images.permute(0, 3, 1, 2)  # [B, C, H, W], channels last in memory
    # Transposing bytes and then widening them moves a quarter of the memory of the other order; two passes
    # in place were measured faster than addcmul, which is slow where its arguments broadcast.
    images = images.contiguous(memory_format=memory_format)
    if images.shape[1] == 1 and memory_format == torch.contiguous_format:
        # one channel has the same bytes in both formats; convolutions choose theirs by the strides
        images = images.squeeze(1).unsqueeze(1)
    return images.to(torch.float32).mul_(constants.scale).add_(constants.shift)
