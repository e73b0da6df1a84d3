"""A data set that fits into memory: its splits, its mean and standard deviation, its loaders."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from okddip.data.augment import Normalization, normalization
from okddip.data.loader import ALL, EvalLoader, Share, TrainLoader
from okddip.data.options import check_options, image_shape
from okddip.data.sources import Source, Split
from okddip.data.stratify import hold_out
from okddip.errors import ConfigError, check_choice


class Dataset:
    """Images of a source, split and ready to be loaded; the constructor's arguments are the keys of
    the config group `dataset`.

    Args:
        name: as shown and logged.
        source: where the images come from, see `okddip.data.sources`.
        root, cache_dir: folders that the source was made with.
        train_size: keep this many training images, a fixed stratified part; None keeps all.
        validation: share of the training images to hold out, a fixed stratified part.
        image_size: a number or (height, width), for sources that scale; None takes the images as they are.
        mean, std: a number a channel, for pixels in [0, 1]; None computes them from the training images.
        pad: pixels of black padding around a training image before a crop of the image's size is drawn.
        flip: whether training images are mirrored at random.
        on_device: keep the images in the device's memory: True, False, or "auto", if they take at most
            `device_share` of what is free there.
        device_share: see `on_device`.

    Raises:
        ConfigError: a value is not allowed, or the source's images or labels are not what they should be.
    """

    def __init__(
        self,
        *,
        name: str,
        source: Source,
        root: str | None = None,
        cache_dir: str | None = None,
        train_size: int | None = None,
        validation: float = 0,
        image_size: int | Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        pad: int = 4,
        flip: bool = True,
        on_device: str | bool = "auto",
        device_share: float = 0.25,
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in ("self", "name", "source")}
        check_options({key: value for key, value in given.items() if value is not None})
        check_source(name, source)
        self.name = name
        self.root = None if root is None else Path(root).expanduser()
        self.classes = source.classes
        height, width, self.channels = source.test.images.shape[1:]
        self.image_size = (height, width)
        if image_shape(image_size) not in (None, self.image_size):
            raise ConfigError(
                f"dataset.image_size={image_size}: the images of {name} are {height}x{width} and are not "
                f"scaled; leave it at null."
            )
        if pad > min(height, width):
            raise ConfigError(
                f"dataset.pad={pad}: the images of {name} are {height}x{width}; with more padding,"
                " some crops would be black."
            )
        self.splits = {"test": source.test}
        if source.train is not None:
            train, val = hold_out(source.train.labels.numpy(), source.classes, validation, train_size)
            self.splits = {"train": _part(source.train, train), "test": source.test}
            if len(val):
                self.splits["val"] = _part(source.train, val)
        self.test_files = source.test_files
        self.sizes = {split: len(part.labels) for split, part in self.splits.items()}
        if mean is None or std is None:  # never of a source without training images
            mean, std = channel_statistics(self.splits["train"].images)
        if len(mean) != self.channels:
            raise ConfigError(
                f"dataset.mean={list(mean)}: the images of {name} have {self.channels} channels; give one "
                f"number for each in dataset.mean and dataset.std, or null to have them computed."
            )
        self.mean, self.std = tuple(mean), tuple(std)
        self.pad = pad
        self.flip = flip
        self.on_device = on_device
        self.device_share = device_share
        self._fitting: dict[torch.device, bool] = {}

    def train_loader(
        self,
        batch_size: int,
        device: torch.device,
        seed: int,
        channels_last: bool = False,
        share: Share = ALL,
        drop_last: bool = False,
        views: int = 1,
    ) -> TrainLoader:
        """Shuffled, augmented batches of the training images; of each batch a share. See `TrainLoader`."""
        return TrainLoader(
            self.splits["train"],
            batch_size,
            device,
            self._constants(device),
            seed=seed,
            pad=self.pad,
            flip=self.flip,
            on_device=self._fits(device),
            channels_last=channels_last,
            share=share,
            drop_last=drop_last,
            views=views,
        )

    def eval_loader(
        self,
        split: str,
        batch_size: int,
        device: torch.device,
        channels_last: bool = False,
        share: Share = ALL,
    ) -> EvalLoader:
        """Batches of a split ("train", "test" or "val") in order, without augmentation; a share of each."""
        check_choice("split", split, self.splits)
        return EvalLoader(
            self.splits[split],
            batch_size,
            device,
            self._constants(device),
            on_device=self._fits(device),
            channels_last=channels_last,
            share=share,
        )

    def digest(self, split: str) -> str:
        """A digest of the images and labels of a split, independent of where they are stored."""
        images, labels = self.splits[split]
        digest = hashlib.blake2b(repr((images.shape, self.classes)).encode(), digest_size=8)
        digest.update(labels.numpy().tobytes())
        for chunk in images.split(4096):
            digest.update(chunk.numpy().tobytes())
        return digest.hexdigest()

    def _constants(self, device: torch.device) -> Normalization:
        return normalization(self.mean, self.std, device)

    def _fits(self, device: torch.device) -> bool:
        """Whether the images are kept in the device's memory."""
        if self.on_device != "auto" or device.type != "cuda":
            return bool(self.on_device)
        if device not in self._fitting:  # once for all splits, before the first takes its memory
            size = sum(split.images.nbytes for split in self.splits.values())
            free, _ = torch.cuda.mem_get_info(device)
            self._fitting[device] = size <= self.device_share * free
        return self._fitting[device]


def check_source(name: str, source: Source) -> None:
    """Check shapes, types and labels of a source.

    Raises:
        ConfigError: names the data set, the split and what is wrong.
    """
    train = source.test if source.train is None else source.train
    for split, (images, labels) in (("train", train), ("test", source.test)):
        where = f"dataset {name}, {split} split"
        if images.ndim != 4 or images.dtype != torch.uint8 or labels.dtype != torch.int64:
            raise ConfigError(
                f"{where}: images must be uint8 [N, H, W, C] and labels int64 [N]; found "
                f"{images.dtype} {list(images.shape)} and {labels.dtype} {list(labels.shape)}."
            )
        if labels.shape != images.shape[:1] or not len(labels):
            raise ConfigError(
                f"{where}: {len(images)} images and {len(labels)} labels; there must be as many of"
                " both, and at least one."
            )
        if images.shape[1:] != train.images.shape[1:]:
            raise ConfigError(
                f"{where}: images are {list(images.shape[1:])} [H, W, C], those of the training split "
                f"{list(train.images.shape[1:])}; they must be equal."
            )
        outside = labels[(labels < 0) | (labels >= len(source.classes))]
        if len(outside):
            raise ConfigError(
                f"{where}: label {outside[0].item()} is outside the range 0 to {len(source.classes) - 1} "
                f"of its {len(source.classes)} classes."
            )


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 images [N, H, W, C], for pixels in [0, 1].

    Raises:
        ConfigError: a channel has one value in all images, so that it cannot be normalised.
    """
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), dtype=np.int64)
    for chunk in images.split(4096):
        for channel in range(channels):
            counts[channel] += torch.bincount(chunk[..., channel].flatten(), minlength=256).numpy()
    values = np.arange(256) / 255
    total = counts.sum(axis=1)
    mean = counts @ values / total
    std = np.sqrt(counts @ values**2 / total - mean**2)
    if (counts > 0).sum(axis=1).min() < 2:
        raise ConfigError(
            "dataset.std=null: a channel has the same value in all training images; give mean and std."
        )
    return mean.tolist(), std.tolist()


def _part(split: Split, indices: np.ndarray) -> Split:
    if len(indices) == len(split.labels):
        return split  # no copy of a whole training set
    index = torch.from_numpy(indices)
    return Split(split.images.index_select(0, index), split.labels.index_select(0, index))
