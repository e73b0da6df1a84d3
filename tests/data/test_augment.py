"""Batched augmentation against the same thing done image by image."""

import pytest
import torch
from dispatch_watch import OneDevice, needs_pretended_cuda
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import functional as TF

from okddip.data.augment import Draws, Normalization, augment, draw, normalization, normalize

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def image_by_image(images: Tensor, draws: Draws, constants: Normalization, pad: int) -> Tensor:
    result = []
    for image, top, left, flip in zip(images, draws.top, draws.left, draws.flip, strict=True):
        height, width, channels = image.shape
        padded = torch.zeros(height + 2 * pad, width + 2 * pad, channels, dtype=torch.uint8)
        padded[pad : pad + height, pad : pad + width] = image
        crop = padded[top : top + height, left : left + width]
        if flip:
            crop = torch.flip(crop, dims=(1,))
        result.append(crop.permute(2, 0, 1).float() * constants.scale + constants.shift)
    return torch.stack(result)


def random_images(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("shape", "pad"), [((64, 32, 32, 3), 4), ((7, 28, 28, 1), 4), ((9, 12, 20, 3), 2), ((15, 8, 8, 3), 0)]
)
def test_augment_equals_the_same_image_by_image(
    shape: tuple[int, ...], pad: int, memory_format: torch.memory_format
) -> None:
    images = random_images(*shape)
    constants = normalization(MEAN[: shape[-1]], STD[: shape[-1]], torch.device("cpu"))
    draws = draw(shape[0], torch.Generator().manual_seed(0), pad, flip=True)
    assert 0 < draws.flip.sum() < shape[0]

    batch = augment(images, draws, constants, pad, memory_format)

    assert torch.equal(batch, image_by_image(images, draws, constants, pad))
    assert batch.is_contiguous(memory_format=memory_format)


def test_normalization_is_that_of_torchvision() -> None:
    images = random_images(4, 8, 8, 3)
    expected = TF.normalize(images.permute(0, 3, 1, 2) / 255, list(MEAN), list(STD))
    torch.testing.assert_close(normalize(images, normalization(MEAN, STD, torch.device("cpu"))), expected)


def test_draws_cover_every_offset_and_both_sides() -> None:
    draws = draw(5000, torch.Generator().manual_seed(0), pad=4, flip=True)
    for offsets in (draws.top, draws.left):
        assert offsets.unique().tolist() == list(range(9))
    assert 0.45 < draws.flip.float().mean() < 0.55
    assert not torch.equal(draws.top, draws.left)


def test_switching_the_flip_off_leaves_the_crops_as_they_were() -> None:
    on, off = (draw(50, torch.Generator().manual_seed(0), pad=4, flip=flip) for flip in (True, False))
    assert torch.equal(on.top, off.top)
    assert torch.equal(on.left, off.left)
    assert not off.flip.any()


@needs_pretended_cuda
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_on_cuda_nothing_touches_the_host(memory_format: torch.memory_format) -> None:
    with FakeTensorMode(), torch.device("cuda"):
        images = torch.zeros(6, 32, 32, 3, dtype=torch.uint8)
        draws = Draws(
            torch.zeros(6, dtype=torch.int64),
            torch.zeros(6, dtype=torch.int64),
            torch.zeros(6, dtype=torch.bool),
        )
        constants = Normalization(torch.ones(3, 1, 1), torch.zeros(3, 1, 1))
        with torch.device("cpu"), OneDevice("cuda") as watch:  # what names no device lands on the host
            batch = augment(images, draws, constants, 4, memory_format)
    assert watch.operators > 0
    assert batch.shape == (6, 3, 32, 32)
    assert batch.device.type == "cuda"
