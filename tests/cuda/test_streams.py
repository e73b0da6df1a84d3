"""No step waits for the device, wherever the images are; and images from the host are the same images."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from on_device import CUDA, Configured, cases, no_wait_for, small_parts, tensors_of
from PIL import Image

from okddip.data.augment import normalization, normalize
from okddip.data.copies import DeviceCopies
from okddip.data.loader import EvalLoader
from okddip.data.sources import Split
from okddip.data.streaming import StreamingDataset
from okddip.run.parts import Parts
from okddip.tasks.benchmark.device_use import overlap, traced
from okddip.tasks.benchmark.steps import TrainerSteps
from okddip.training import metrics
from okddip.training.epoch import evaluate_on, train_on

DEVICES = ["cpu", CUDA]


def check_that_nothing_waits(
    parts: Parts, watch: Callable[[torch.device], AbstractContextManager[None]] = no_wait_for
) -> None:
    """In training steps, over the end of an epoch, and in evaluation batches."""
    steps = TrainerSteps(parts)
    for module in (parts.group, parts.method):
        module.train()
    for _ in range(3):  # libraries are set up, memory is taken, the optimizer gets its state
        steps.train_step()
    steps.evaluate()
    for module in (parts.group, parts.method):
        module.train()
    with watch(parts.trainer.device):
        for _ in range(len(parts.dataset.splits["train"].labels) // parts.trainer.batch_size + 1):
            steps.train_step()
        assert steps.sums is not None
        metrics.sent_to_host(steps.sums["broken"])  # as an epoch does every so many steps
        steps.evaluate_batches(steps.eval_loader.batches())


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize(("device", "option", "structure"), cases(("okddip", "branch")))
def test_no_step_waits_for_the_device(
    configured: Configured, device: str, option: str, structure: str, on_device: bool
) -> None:
    overrides = [f"dataset.on_device={on_device}".lower()]
    check_that_nothing_waits(small_parts(configured, device, option, structure, *overrides))


@pytest.mark.parametrize(
    "overrides",
    [["trainer.precision=fp16", "trainer.gradient_clip=1"], ["trainer.precision=bf16", "optimizer=adamw"]],
)
@pytest.mark.parametrize("device", DEVICES)
def test_no_scaled_or_clipped_step_waits_for_the_device(
    configured: Configured, device: str, overrides: list[str]
) -> None:
    check_that_nothing_waits(small_parts(configured, device, "okddip", "branch", *overrides))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("device", [CUDA])
def test_no_compiled_step_waits_for_the_device(configured: Configured, device: str, mode: str) -> None:
    compiled = ("trainer.compile=true", f"trainer.compile_mode={mode}", "method.peers=3")
    check_that_nothing_waits(small_parts(configured, device, "okddip", "branch", *compiled))


@pytest.mark.parametrize("device", DEVICES)
def test_no_step_on_images_that_are_decoded_meanwhile_waits_for_the_device(
    configured: Configured, device: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in map(str, range(10)):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(256, size=(20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    parts = small_parts(configured, device, "okddip", "branch", "trainer.batch_size=8")
    parts.dataset = StreamingDataset(  # type: ignore[assignment]
        name="tiny",
        root=str(tmp_path),
        mean=[0.5] * 3,
        std=[0.25] * 3,
        image_size=16,
        resize=18,
        workers=0,
    )
    if device == "cpu":  # what decodes reads numbers of its own there
        check_that_nothing_waits(parts, nullcontext)
    else:
        check_that_nothing_waits(parts)


@pytest.mark.parametrize("device", DEVICES)
def test_images_kept_on_the_device_and_copied_to_it_give_the_same_epoch(
    configured: Configured, device: str
) -> None:
    epochs = []
    for on_device in ("true", "false"):
        overrides = (f"dataset.on_device={on_device}", "trainer.deterministic=true")
        parts = small_parts(configured, device, "okddip", "branch", *overrides)
        try:
            steps = TrainerSteps(parts)
            loader = parts.dataset.train_loader(16, parts.trainer.device, 0, True)
            assert loader.on_device == (on_device == "true" or device == "cpu")
            args = (parts.group, parts.method)
            sums = train_on(*args, steps.train_one, loader.batches(0), steps.ramp, 0)
            measured = evaluate_on(*args, steps.eval_forward, steps.eval_loader.batches(), steps.ramp)
        finally:
            torch.use_deterministic_algorithms(False)
        sums = {name: value.cpu() for name, value in sums.items()}
        epochs.append({**sums, **{f"test {k}": v.cpu() for k, v in measured.items()}, **tensors_of(parts)})
    assert epochs[0].keys() == epochs[1].keys()
    for name, value in epochs[0].items():
        assert torch.equal(value, epochs[1][name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_copies_are_what_was_copied_and_on_a_gpu_have_a_stream_of_their_own(device: str) -> None:
    place = torch.device(device)
    copies = DeviceCopies(place)
    host = [torch.arange(1000.0), torch.tensor([3])]
    if place.type == "cuda":
        host = [tensor.pin_memory() for tensor in host]
        assert copies.stream != torch.cuda.current_stream()
    for _ in range(5):  # the memory of one may become that of the next
        arrived = copies(*host)
        assert all(tensor.device.type == device for tensor in arrived)
        for tensor, original in zip(arrived, host, strict=True):
            assert torch.equal((tensor * 2).cpu(), original * 2)


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_images_arrive_from_either_memory(device: str, on_device: bool) -> None:
    place, host = torch.device(device), torch.device("cpu")
    split = Split(torch.randint(256, (40, 8, 8, 3), dtype=torch.uint8), torch.arange(40) % 10)
    statistics = ([0.5] * 3, [0.25] * 3)
    loader = EvalLoader(split, 16, place, normalization(*statistics, place), on_device=on_device)
    images, labels = (torch.cat(parts).cpu() for parts in zip(*loader.batches(), strict=True))
    torch.testing.assert_close(images, normalize(split.images, normalization(*statistics, host)))
    assert torch.equal(labels, split.labels)


@pytest.mark.parametrize("device", [CUDA])
def test_copies_run_beside_the_step_before(
    configured: Configured, record_property: Callable[[str, object], None], device: str
) -> None:
    parts = small_parts(
        *(configured, device, "baseline", "network", "dataset.on_device=false", "trainer.precision=fp32"),
        *("model=resnet20", "trainer.batch_size=8192"),  # a step that takes longer than its launches
    )
    steps = TrainerSteps(parts)
    parts.group.train()
    for _ in range(10):
        steps.train_step()
    events = traced(steps.train_step, parts.trainer.device, 10)
    kernels = [event for event in events if event.get("cat") == "kernel"]
    copied = [event for event in events if event.get("cat") == "gpu_memcpy" and "HtoD" in event["name"]]
    assert len(copied) >= 2 * 10  # images and labels of each batch
    large = [event for event in copied if event["args"]["bytes"] >= 8192 * 16 * 16 * 3]
    assert not {e["args"]["stream"] for e in large} & {e["args"]["stream"] for e in kernels}
    beside = overlap(*([(e["ts"], e["ts"] + e["dur"]) for e in part] for part in (large, kernels)))
    copying, computing = (sum(event["dur"] for event in part) for part in (large, kernels))
    for name, time in (("copies", copying), ("copies_beside_kernels", beside), ("kernels", computing)):
        record_property(f"{name}_us_in_10_steps", round(time))
    assert beside > 0.5 * copying
