"""Loaders of data sets in memory."""

import pytest
import torch

from okddip.data.augment import normalization, normalize
from okddip.data.loader import EvalLoader, Share, TrainLoader, batch_seed, seed_of
from okddip.data.sources import Split
from okddip.tasks.benchmark.counting import OperatorCounter

CPU = torch.device("cpu")
CONSTANTS = normalization([0.5] * 3, [0.25] * 3, CPU)
SPLIT = Split(
    torch.randint(256, (50, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    torch.arange(50),  # every image has a label of its own, so that the order can be seen
)


def train_loader(seed: int = 0, pad: int = 2, flip: bool = True, channels_last: bool = False) -> TrainLoader:
    return TrainLoader(SPLIT, 16, CPU, CONSTANTS, seed=seed, pad=pad, flip=flip, channels_last=channels_last)


def order_of(loader: TrainLoader | EvalLoader, epoch: int) -> list[int]:
    return torch.cat([labels for _, labels in loader.batches(epoch)]).tolist()


def test_an_epoch_has_every_image_once_and_a_smaller_last_batch() -> None:
    loader = train_loader()
    batches = list(loader.batches(0))
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
    assert len(loader) == 4
    assert loader.size == 50
    assert sorted(order_of(loader, 0)) == list(range(50))
    assert batches[0][0].shape == (16, 3, 8, 8)
    assert batches[0][0].dtype == torch.float32


def test_short_batches_are_left_out_on_request_and_other_images_in_each_epoch() -> None:
    loader = TrainLoader(SPLIT, 16, CPU, CONSTANTS, seed=0, pad=2, flip=True, drop_last=True)
    assert [len(labels) for _, labels in loader.batches(0)] == [16, 16, 16]
    assert len(loader) == 3
    assert order_of(loader, 0) == order_of(train_loader(), 0)[:48]
    assert set(order_of(loader, 0)) != set(order_of(loader, 1))


def test_the_same_seed_gives_the_same_batches_and_epochs_hang_on_no_other() -> None:
    fresh = list(train_loader(seed=3).batches(5))
    used = train_loader(seed=3)
    list(used.batches(0))
    for (images, labels), (images_again, labels_again) in zip(fresh, used.batches(5), strict=True):
        assert torch.equal(labels, labels_again)
        assert torch.equal(images, images_again)


def test_epochs_and_seeds_differ_in_order_and_in_augmentation() -> None:
    runs = {(seed, epoch): order_of(train_loader(seed), epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert len({tuple(order) for order in runs.values()}) == 4
    one_image = Split(SPLIT.images[:1].expand(16, -1, -1, -1), SPLIT.labels[:16])
    first, second = (
        next(TrainLoader(one_image, 16, CPU, CONSTANTS, seed=0, pad=2, flip=True).batches(epoch))[0]
        for epoch in (0, 1)
    )
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_order_and_batches_have_seeds_of_their_own() -> None:
    seeds = [
        seed_of(0, 0),
        *(batch_seed(0, 0, step) for step in range(3)),
        batch_seed(0, 1, 0),
        batch_seed(1, 0, 0),
    ]
    assert len(set(seeds)) == len(seeds)


def test_without_padding_and_flip_training_images_are_only_shuffled() -> None:
    for images, labels in train_loader(pad=0, flip=False).batches(0):
        assert torch.equal(images, normalize(SPLIT.images[labels], CONSTANTS))


def test_evaluation_goes_through_the_images_in_order_and_leaves_them_as_they_are() -> None:
    loader = EvalLoader(SPLIT, 16, CPU, CONSTANTS)
    assert order_of(loader, 0) == list(range(50))
    images = torch.cat([images for images, _ in loader.batches()])
    assert torch.equal(images, normalize(SPLIT.images, CONSTANTS))


@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_come_in_the_memory_format_that_was_asked_for(channels_last: bool) -> None:
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    loaders = (
        train_loader(channels_last=channels_last),
        EvalLoader(SPLIT, 16, CPU, CONSTANTS, channels_last=channels_last),
    )
    for loader in loaders:
        assert all(images.is_contiguous(memory_format=wanted) for images, _ in loader.batches(0))


@pytest.mark.parametrize("loader", [train_loader(), EvalLoader(SPLIT, 16, CPU, CONSTANTS)])
def test_the_host_reads_nothing_while_batches_are_made(loader: TrainLoader | EvalLoader) -> None:
    with OperatorCounter() as watch:
        for _ in loader.batches(0):
            pass
    assert watch.total > 0
    assert watch.found == []


def test_the_watch_finds_reads() -> None:
    values = torch.arange(4)
    with OperatorCounter() as watch:
        values.sum().item()
        values[values > 2]
        values.to("meta")
    assert [found.split()[0] for found in watch.found] == [
        "aten._local_scalar_dense.default",
        "aten.index.Tensor",
        "aten._to_copy.default",
    ]


def test_on_a_cpu_keeping_the_images_on_the_host_makes_no_difference() -> None:
    loaders = [EvalLoader(SPLIT, 16, CPU, CONSTANTS, on_device=on_device) for on_device in (True, False)]
    for (images, labels), (others, other_labels) in zip(*(x.batches() for x in loaders), strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


def test_the_first_view_is_the_only_one_of_others_and_each_view_has_its_own_augmentation() -> None:
    [plain, *_] = train_loader().batches(2)
    loader = TrainLoader(SPLIT, 16, CPU, CONSTANTS, seed=0, pad=2, flip=True, views=3)
    batches = list(loader.batches(2))
    images, labels = batches[0]  # [B, V, C, H, W]
    assert images.shape == (16, 3, 3, 8, 8)
    assert torch.equal(labels, plain[1])
    assert torch.equal(images[:, 0], plain[0])
    differ = [(images[:, a] != images[:, b]).any().item() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert differ == [True] * 3
    shares = [
        list(
            TrainLoader(
                *(SPLIT, 16, CPU, CONSTANTS), seed=0, pad=2, flip=True, views=3, share=Share(rank, 2)
            ).batches(2)
        )
        for rank in range(2)
    ]
    for number, (whole, _) in enumerate(batches):  # the last has two images, none for the second rank
        assert torch.equal(torch.cat([share[number][0] for share in shares]), whole)
