"""Batches of a data set whose uint8 images are held in memory: the host's or the device's."""

from collections.abc import Generator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from okddip.data.augment import Draws, Normalization, augment, draw, normalize
from okddip.data.copies import DeviceCopies
from okddip.data.sources import Split

Batches = Generator[tuple[Tensor, Tensor], None, None]  # images and labels; closed by the consumer


def seed_of(*words: int) -> int:
    """A 64-bit seed for a generator, mixed from non-negative integers such as (seed, epoch)."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def batch_seed(seed: int, epoch: int, step: int, view: int = 0) -> int:
    """The seed of the random draws of one batch, or of one of several views of it."""
    # steps count from 1 here: to SeedSequence (seed, epoch) and (seed, epoch, 0) are the same, and
    # (seed, epoch) is the seed of the epoch's order
    return seed_of(seed, epoch, step + 1, *((0, view) if view else ()))


class Share(NamedTuple):
    """The part of each batch that a loader yields: that of one rank of several, or all."""

    rank: int = 0
    ranks: int = 1

    def of(self, size: int) -> slice:
        """The part of a batch of `size` images.

        Parts are as equal as possible. Each has no image, or at least two (batch norm cannot normalise a
        single value).
        """
        sharing = max(1, min(self.ranks, size // 2))
        first, end = (min(rank, sharing) * size // sharing for rank in (self.rank, self.rank + 1))
        return slice(first, end)

    def size(self, size: int) -> int:
        """How many images the part of a batch of `size` has."""
        return len(range(size)[self.of(size)])


ALL = Share()


class _Loader:
    """What training and evaluation share: the images, the number of batches, the copy to the device."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        device: torch.device,
        constants: Normalization,
        on_device: bool,
        channels_last: bool,
        share: Share,
    ) -> None:
        self.size = len(split.labels)
        self.batch_size = batch_size
        self.share = share
        self.device = device
        self.constants = constants
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.on_device = on_device or device.type == "cpu"  # whose memory is the host's
        place = device if self.on_device else torch.device("cpu")
        self.images, self.labels = split.images.to(place), split.labels.to(place)
        self.copies = None if self.on_device else DeviceCopies(device)

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def _take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images [B, H, W, C] and labels [B] at `indices`, on the device; never waits for it."""
        if self.copies is None:
            return self.images.index_select(0, indices), self.labels.index_select(0, indices)
        # gathered into page-locked memory, for whose copy the host does not wait; the
        # allocator hands the buffer out again only after the copy
        images = torch.empty(len(indices), *self.images.shape[1:], dtype=torch.uint8, pin_memory=True)
        labels = torch.empty(len(indices), dtype=torch.int64, pin_memory=True)
        torch.index_select(self.images, 0, indices, out=images)
        torch.index_select(self.labels, 0, indices, out=labels)
        images, labels = self.copies(images, labels)
        return images, labels


class TrainLoader(_Loader):
    """Shuffled and augmented batches; random draws depend on seed, epoch and step alone.

    Args:
        split: uint8 images [N, H, W, C], labels [N].
        batch_size: the last batch of an epoch may be smaller. One image alone is left out: batch norm cannot
            normalise a single value.
        drop_last: leave out any smaller batch. Which images that are changes with the epoch's order.
        device: of the batches.
        constants: of the normalisation, on `device`.
        seed: non-negative.
        pad, flip: see `augment`.
        on_device: whether the images are kept on `device` or stay on the host.
        channels_last: memory format of the batches.
        share: the part of each batch that is yielded; sharing changes no image.
        views: how many augmentations of each image a batch has; the first is the same for any number.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        device: torch.device,
        constants: Normalization,
        *,
        seed: int,
        pad: int,
        flip: bool,
        on_device: bool = True,
        channels_last: bool = False,
        share: Share = ALL,
        drop_last: bool = False,
        views: int = 1,
    ) -> None:
        super().__init__(split, batch_size, device, constants, on_device, channels_last, share)
        self.smallest = batch_size if drop_last else 2
        self.views = views
        self.seed = seed
        self.pad = pad
        self.flip = flip

    def __len__(self) -> int:
        return self.size // self.batch_size + (self.size % self.batch_size >= self.smallest)

    def batches(self, epoch: int) -> Batches:
        """Images and labels [B] of one epoch (counted from 0), on the device.

        Images are float32 [B, C, H, W], or [B, V, C, H, W] of several views.
        """
        # on the CPU, so that ranks agree on the order even if only some keep the images on their device
        shuffler = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        order = torch.randperm(self.size, generator=shuffler, pin_memory=self.images.is_cuda)
        order = order.to(self.images.device, non_blocking=True)
        drawer = torch.Generator(self.device)
        for step, indices in enumerate(order.split(self.batch_size)[: len(self)]):
            part = self.share.of(len(indices))
            images, labels = self._take(indices[part])
            views = []
            for view in range(self.views):
                drawer.manual_seed(batch_seed(self.seed, epoch, step, view))
                draws = Draws(*(x[part] for x in draw(len(indices), drawer, self.pad, self.flip)))
                views.append(augment(images, draws, self.constants, self.pad, self.memory_format))
            yield views_of_batch(torch.cat(views), self.views) if self.views > 1 else views[0], labels


def views_of_batch(images: Tensor, views: int) -> Tensor:
    """View after view of a batch [V * B, ...] as [B, V, ...], where they lie."""
    return images.unflatten(0, (views, len(images) // views)).transpose(0, 1)


class EvalLoader(_Loader):
    """All images in order, normalised and not augmented."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        device: torch.device,
        constants: Normalization,
        *,
        on_device: bool = True,
        channels_last: bool = False,
        share: Share = ALL,
    ) -> None:
        super().__init__(split, batch_size, device, constants, on_device, channels_last, share)

    def batches(self, epoch: int = 0) -> Batches:
        """Images [B, C, H, W] float32 and labels [B] on the device; the same in every epoch."""
        for indices in torch.arange(self.size, device=self.images.device).split(self.batch_size):
            images, labels = self._take(indices[self.share.of(len(indices))])
            yield normalize(images, self.constants, self.memory_format), labels
