"""Image folders too large for memory: decoded by worker processes while the model trains."""

import hashlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset
from torchvision.transforms import v2

from okddip import distributed
from okddip.data.augment import Normalization, normalization, normalize
from okddip.data.copies import DeviceCopies
from okddip.data.evaluation_images import evaluation_folder, scan_evaluation
from okddip.data.folder import scan
from okddip.data.images import read_image, scale_and_crop
from okddip.data.loader import ALL, Batches, Share, batch_seed, seed_of, views_of_batch
from okddip.data.options import check_options
from okddip.data.stratify import hold_out
from okddip.errors import ConfigError, check_choice, raise_problems
from okddip.signals import ignore_signals_in_worker, stops_deferred
from okddip.text import for_terminal

log = logging.getLogger(__name__)


class StreamingDataset:
    """root/train/CLASS/* and root/val/CLASS/* (ImageNet's folders; val is the test split), in RGB.

    Training images are random resized crops (area 8% to 100%, aspect ratio 3/4 to 4/3), flipped at random;
    test images are scaled until their shorter side is `resize` and cropped at the centre. Has the
    attributes and methods of `okddip.data.dataset.Dataset`; the constructor's arguments are the keys of the
    config group.

    Args:
        name, root, train_size, validation, mean, std, flip: as there; mean and std must be given.
        image_size: of the crops, one number.
        resize: see above; at least `image_size`.
        workers: processes that decode, at most one a core; 0 decodes in the training process. The images
            are the same for any number.
        classes: of a network that is to be measured: the test images alone are read, of root/val/CLASS/* or
            root/CLASS/*, and may be of some of these classes.
        bad_images: for an image that cannot be read: "refuse" ends the run with its name, "skip" leaves it
            out of its batch, logs a warning, and counts it in the loader's `skipped`.
        pad, on_device: for data sets in memory; only None and False are allowed.
        cache_dir, device_share: for data sets in memory; ignored.

    Raises:
        ConfigError: a value is not allowed, or a folder is not as it should be.
    """

    channels = 3

    def __init__(
        self,
        *,
        name: str,
        root: str,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int = 224,
        resize: int = 256,
        flip: bool = True,
        train_size: int | None = None,
        validation: float = 0,
        workers: int = 8,
        bad_images: str = "skip",
        pad: int | None = None,
        on_device: str | bool = False,
        cache_dir: str | None = None,
        device_share: float | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        check_options(
            {
                "root": root,
                "mean": mean,
                "std": std,
                "image_size": image_size,
                "resize": resize,
                "flip": flip,
                "train_size": train_size,
                "validation": validation,
                "workers": workers,
                "bad_images": bad_images,
            }
        )
        self._check_streamed(image_size, resize, mean, pad, on_device)
        folder = Path(root).expanduser()
        if classes is None:
            listing = scan(folder, ("train", "val"))
        else:
            listing = scan_evaluation(evaluation_folder(folder, "val"), classes)
        # as bytes: counting references to Python strings would copy their memory in each worker
        *learned, test = (
            Files(np.array([os.fsencode(path) for path in paths]), listing.labels[split])
            for split, paths in listing.files.items()
        )
        self.splits = {"test": test}
        for paths, labels in learned:
            train, val = hold_out(labels, listing.classes, validation, train_size)
            self.splits = {"train": Files(paths[train], labels[train]), "test": test}
            if len(val):
                self.splits["val"] = Files(paths[val], labels[val])
        self.name = name
        self.classes = listing.classes
        self.image_size = (image_size, image_size)
        self.sizes = {split: len(part.labels) for split, part in self.splits.items()}
        self.mean, self.std = tuple(mean), tuple(std)
        cores = len(os.sched_getaffinity(0)) // distributed.local_world_size()
        self.workers = min(workers, max(1, cores))
        self.bad_images = bad_images
        self.train_transform = v2.Compose(
            [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(0.5 if flip else 0.0)]
        )
        self.test_transform = partial(scale_and_crop, shorter=resize, size=self.image_size)

    @staticmethod
    def _check_streamed(
        image_size: object, resize: int, mean: Sequence[float] | None, pad: object, on_device: object
    ) -> None:
        """Refuse what only data sets in memory allow."""
        if not isinstance(image_size, int) or resize < image_size:
            raise ConfigError(
                f"dataset.image_size={image_size}, dataset.resize={resize}: a streamed data set needs one "
                f"number for the image size, and resize at least as large."
            )
        if mean is None or len(mean) != 3:
            raise ConfigError(
                f"dataset.mean={mean}: a streamed data set needs three numbers each in dataset.mean and std."
            )
        if pad is not None or on_device is not False:
            raise ConfigError(
                f"dataset.pad={pad}, dataset.on_device={on_device}: do not apply to a streamed data set; "
                f"leave them at null and false."
            )

    @property
    def test_files(self) -> list[str]:
        """The paths of the test images, [N]."""
        return [os.fsdecode(path) for path in self.splits["test"].paths]

    def digest(self, split: str) -> str:
        """A digest of the names and labels of a split's files, without the folder; reads no image."""
        paths, labels = self.splits[split]
        digest = hashlib.blake2b(repr(self.classes).encode(), digest_size=8)
        digest.update(labels.tobytes())
        for path in paths:
            digest.update(os.path.basename(path) + b"\0")  # noqa: PTH119 - bytes, a million of them
        return digest.hexdigest()

    def train_loader(
        self,
        batch_size: int,
        device: torch.device,
        seed: int,
        channels_last: bool = False,
        share: Share = ALL,
        drop_last: bool = False,
        views: int = 1,
    ) -> "StreamingLoader":
        """Shuffled, augmented batches of the training images, or a share of each. See `TrainLoader`."""
        return StreamingLoader(
            self,
            self.splits["train"],
            self.train_transform,
            batch_size,
            device,
            channels_last,
            seed=seed,
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
    ) -> "StreamingLoader":
        """Batches of a split ("train", "test" or "val") in order, not augmented, or a share of each."""
        check_choice("split", split, self.splits)
        return StreamingLoader(
            self,
            self.splits[split],
            self.test_transform,
            batch_size,
            device,
            channels_last,
            seed=None,
            share=share,
        )


class Files(NamedTuple):
    paths: np.ndarray  # [N] bytes
    labels: np.ndarray  # [N] int64


class StreamingLoader:
    """Batches that workers decode ahead; they are copied asynchronously to the device and normalised there.

    Args:
        seed: None for all images in order.
        share, drop_last, views: see `okddip.data.loader.TrainLoader`.
    """

    def __init__(
        self,
        dataset: StreamingDataset,
        files: Files,
        transform: Callable[[Image.Image], Image.Image],
        batch_size: int,
        device: torch.device,
        channels_last: bool,
        *,
        seed: int | None,
        share: Share,
        drop_last: bool = False,
        views: int = 1,
    ) -> None:
        self.share = share
        self.views = views
        self.smallest = 1 if seed is None else batch_size if drop_last else 2
        self.image_size = dataset.image_size
        self.size = len(files.labels)
        self.skipped = 0  # images left out so far because they cannot be read
        self.unread: set[int] = set()  # which, as they are counted in the split
        self.batch_size = batch_size
        self.device = device
        self.copies = DeviceCopies(device)
        self.seed = seed
        self.bad_images = dataset.bad_images
        self.workers = dataset.workers
        self.samples = _Samples(files, transform)
        self.constants: Normalization = normalization(dataset.mean, dataset.std, device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __len__(self) -> int:
        return self.size // self.batch_size + (self.size % self.batch_size >= self.smallest)

    def batches(self, epoch: int = 0) -> Batches:
        """Images and labels [B] of one epoch (counted from 0), on the device.

        Images are float32 [B, 3, H, W], or [B, V, 3, H, W] of several views.
        Workers decode until it is closed.

        Raises:
            ConfigError: an image cannot be read and `bad_images` is "refuse".
        """
        loader = DataLoader(
            self.samples,
            batch_sampler=self._draws(epoch),
            collate_fn=_collate,
            num_workers=self.workers,
            worker_init_fn=ignore_signals_in_worker,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the default generator, which dropout uses
        )
        with closing(self._decoded(loader)) as decoded:
            for images, labels, errors in decoded:
                if errors and self.bad_images == "refuse":
                    hint = (
                        "Or leave out what cannot be read, and have all of it named: dataset.bad_images=skip."
                    )
                    first, *others = [error.reason for error in errors]
                    raise_problems("dataset.bad_images=refuse", [f"{first} {hint}", *others])
                for error in errors:
                    self.skipped += 1
                    self.unread.add(error.image)
                    log.warning("Skipped (%d so far): %s", self.skipped, error.reason)
                alone = 1 if self.seed is not None else 0  # batch norm cannot normalise a single value
                if len(labels) <= alone:
                    images, labels = torch.empty(0, *self.image_size, 3, dtype=torch.uint8), labels[:0]
                    images = images.expand(self.views, *images.shape)
                if len(labels) or self.share.ranks > 1:  # other ranks may have images of this batch
                    images, labels = self.copies(images, labels)  # [V, B, H, W, 3] uint8
                    images = normalize(images.flatten(0, 1), self.constants, self.memory_format)
                    yield views_of_batch(images, self.views) if self.views > 1 else images, labels

    def _decoded(self, loader: DataLoader) -> Generator[tuple[Tensor, Tensor, list["Unread"]], None, None]:
        others = set(multiprocessing.active_children())
        batches = None
        try:
            with stops_deferred():  # Python drops an exception that is raised while a process forks
                batches = iter(loader)
            if threading.current_thread() is threading.main_thread():
                # PyTorch's handler would raise for a dead worker at any point of the training
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            yield from batches
        except (RuntimeError, OSError, EOFError) as error:
            if isinstance(error, RuntimeError) and "worker" not in str(error):
                raise
            # in most cases it was killed because memory was full
            raise ConfigError(
                f"dataset.workers={self.workers}: a process that decodes images has died, or could not start"
                f" ({(str(error) or type(error).__name__).splitlines()[0]}). Is memory or"
                " /dev/shm full? Fewer workers need less. The last checkpoint is whole; resume with"
                " trainer.resume=auto."
            ) from error
        finally:
            # This ends the workers, unless a traceback refers to it. They ignore signals, and this process
            # would wait for them when it ends.
            del batches
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()

    def _draws(self, epoch: int) -> Iterator[list["Draw"]]:
        """The images of each batch with their seeds.

        A seed depends on the image's place in the epoch, not on the worker that decodes it or on the rank.
        """
        order = torch.arange(self.size)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            order = torch.randperm(self.size, generator=generator)
        for first in range(0, self.size, self.batch_size)[: len(self)]:
            places = range(first, min(first + self.batch_size, self.size))
            yield [
                Draw(int(order[place]), self._seeds(epoch, place))
                for place in places[self.share.of(len(places))]
            ]

    def _seeds(self, epoch: int, place: int) -> tuple[int, ...]:
        if self.seed is None:
            return ()
        return tuple(batch_seed(self.seed, epoch, place, view) for view in range(self.views))


class Draw(NamedTuple):
    """Which image, and the seed of the augmentation of each of its views (empty for one, not augmented)."""

    image: int
    seeds: tuple[int, ...]


class Unread(NamedTuple):
    """Which image cannot be read, and why."""

    image: int
    reason: str


class _Samples(MapDataset):
    """Decoded and transformed images with their labels."""

    def __init__(self, files: Files, transform: Callable[[Image.Image], Image.Image]) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files.labels)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int] | Unread:
        path = os.fsdecode(self.files.paths[draw.image])
        try:
            image = read_image(path)
            # the transforms draw from the default generator, which without workers is that of the training
            views = []
            with torch.random.fork_rng(devices=[], enabled=bool(draw.seeds)):
                for seed in draw.seeds or (None,):
                    if seed is not None:
                        torch.default_generator.manual_seed(seed)  # that of the CPU alone
                    views.append(np.asarray(self.transform(image)))
        except ConfigError as error:
            return Unread(draw.image, str(error))
        except (OSError, ValueError, MemoryError) as error:
            reason = str(error) or "out of memory"
            return Unread(
                draw.image, f"{for_terminal(path)}: cannot be scaled ({reason}); remove or replace it."
            )
        return torch.from_numpy(np.stack(views)), int(self.files.labels[draw.image])


def _collate(samples: list[tuple[Tensor, int] | Unread]) -> tuple[Tensor, Tensor, list[Unread]]:
    good = [sample for sample in samples if not isinstance(sample, Unread)]
    views = torch.stack([views for views, _ in good], 1) if good else torch.empty(0, dtype=torch.uint8)
    labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    return views, labels, [sample for sample in samples if isinstance(sample, Unread)]
