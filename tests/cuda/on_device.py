"""What tests on a GPU share: devices to try, every method and structure, small groups, whole runs.

What does not need a GPU is tried on the CPU too, by the same functions.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import CASES, overrides_of
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from okddip.assembly import make
from okddip.main import build_group, make_without_data
from okddip.run.parts import Parts
from okddip.tasks.benchmark.counting import OperatorCounter
from okddip.tasks.benchmark.synthetic import DataShape, with_synthetic_images
from okddip.tracking.tracker import NoTracking
from okddip.training import checkpoint
from okddip.training.peers import parameter_groups

# cuBLAS reads it when it is first used, which another test may be the first to do
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

Configured = Callable[..., DictConfig]
REPOSITORY = Path(__file__).parents[2]
ON_CUDA = (
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
)
CUDA = pytest.param("cuda", marks=ON_CUDA)
SLOW_ON_CPU = [pytest.param("cpu", marks=pytest.mark.slow), CUDA]

SIZE = 16  # of the images


def cases(*on_cpu: tuple[str, str]) -> list[Any]:
    """Device, method and structure for parametrize: all on CUDA, on the CPU those that are given."""
    return [
        *(("cpu", *case) for case in on_cpu),
        *(pytest.param("cuda", *case, marks=ON_CUDA, id="-".join(("cuda", *case))) for case in CASES),
    ]


def small_parts(configured: Configured, device: str, option: str, structure: str, *overrides: str) -> Parts:
    """A small group of peers of a method, with random images; with the same weights on any device."""
    given = [f"method={option}", *overrides_of(option, structure), f"trainer.device={device}"]
    small = ("model=resnet8", "trainer.batch_size=16", "trainer.eval_batch_size=32", "optimizer.lr=0.01")
    same = ("tracking=none", "trainer.tf32=false", "trainer.cudnn_benchmark=false")
    config = configured(*same, *small, *given, *overrides)
    config = with_synthetic_images(config, DataShape((SIZE, SIZE), 3, 10), {})
    config.dataset.source.train = 5 * config.trainer.batch_size  # an epoch of five batches
    OmegaConf.resolve(config)

    torch.manual_seed(0)
    trainer, schedule, make_optimizer, _, method = make_without_data(config)
    dataset = make("dataset", config.dataset)
    method.prepare(len(dataset.classes))
    teachers = [make("model", config.model, num_classes=10, in_channels=3)] if option == "kd" else []
    group, method = build_group(config, method, dataset, trainer, teachers)
    optimizer = make_optimizer(parameter_groups(group, method))
    return Parts(trainer, NoTracking(), dataset, group, method, optimizer, schedule)


def batches(number: int, size: int = 16, views: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches for any device: images [B, C, H, W], or [B, V, C, H, W] of several views; labels."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        shape = (size, 3, SIZE, SIZE) if views == 1 else (size, views, 3, SIZE, SIZE)
        yield torch.randn(shape, generator=generator), torch.randint(10, (size,), generator=generator)


def tensors_of(parts: Parts) -> dict[str, Tensor]:
    """What has been learned, on the host."""
    modules: tuple[nn.Module, ...] = (parts.group, parts.method)
    return {
        f"{number}.{name}": tensor.cpu()
        for number, module in enumerate(modules)
        for name, tensor in module.state_dict().items()
    }


@contextmanager
def no_wait_for(device: torch.device) -> Iterator[None]:
    """Nothing within waits for the device, or, where that is the CPU, reads what a device would have."""
    if device.type != "cuda":
        with OperatorCounter() as operators:
            yield
        assert operators.host_reads == 0, operators.found
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def start(*command: str) -> "subprocess.Popen[str]":
    """The program in a process of its own, in this folder."""
    known = os.environ.get("PYTHONPATH")  # there may be no other way to what it imports
    return subprocess.Popen(
        [sys.executable, "-m", "okddip.main", *command],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [known])])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*command: str) -> None:
    process = start(*command)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def learned(folder: Path) -> dict[str, Tensor]:
    """Weights and the optimizer's moments of a run's last checkpoint, which must be whole."""
    state = checkpoint.load(folder / "last.pt")
    moments = {
        f"{name}{index}": value
        for index, values in state["optimizer"]["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    return {**state["group"], **state["method"], **moments}
