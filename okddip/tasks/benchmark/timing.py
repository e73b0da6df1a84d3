"""How long calls take."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import nn
from tqdm.auto import tqdm

from okddip import distributed
from okddip.training.precision import PRECISIONS, is_native
from okddip.training.trainer import Trainer

MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}  # side of the matrices whose product shows the machine's peak
COPY_BYTES = {"cpu": 2**27, "cuda": 2**28}  # more than caches hold


class Workload(NamedTuple):
    """A call that is timed."""

    run: Callable[[], object]
    size: int  # images that it processes, or floating-point operations


def quartiles(samples: Sequence[float]) -> dict[str, float]:
    """The median of samples, and their lower and upper quartile."""
    if len(samples) == 1:
        return dict.fromkeys(("median", "low", "high"), samples[0])
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def time_in_turns(
    workloads: Mapping[tuple[str, str], Workload],
    modules: Sequence[nn.Module],
    device: torch.device,
    settings: DictConfig,
) -> dict[tuple[str, str], list[float]]:
    """Time each workload `repeats` times, in turns: what slows the machine for a while slows all of them.

    Args:
        workloads: by part of the training and whose it is.
        modules: put into training mode for `train`, else into evaluation mode.
        device: is waited for before the clock is read.
        settings: warmup, repeats and seconds of conf/task/benchmark.

    Returns:
        Images (or operations) a second, [repeats] for each workload.
    """
    times: dict[tuple[str, str], int] = {}
    speeds: dict[tuple[str, str], list[float]] = {name: [] for name in workloads}
    with tqdm(
        total=len(workloads) * (1 + settings.repeats), leave=False, disable=distributed.hide_progress_bar()
    ) as progress:
        for name, workload in workloads.items():
            progress.set_description(f"warm-up {' '.join(name)}")
            set_mode(modules, training=name[0] == "train")
            for _ in range(settings.warmup):
                workload.run()
            once = seconds_of(workload.run, 1, device)
            times[name] = distributed.from_rank_0(partial(repetitions, settings.seconds, once))
            progress.update()
        for _ in range(settings.repeats):
            for name, workload in workloads.items():
                progress.set_description(" ".join(name))
                set_mode(modules, training=name[0] == "train")
                speeds[name].append(
                    workload.size * times[name] / seconds_of(workload.run, times[name], device)
                )
                progress.update()
    return speeds


def repetitions(seconds: float, once: float) -> int:
    """How many calls, each of which takes `once` seconds, fill `seconds`."""
    return max(1, math.ceil(seconds / once))


def seconds_of(run: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds that the device takes for a number of calls; on CUDA by its own clock."""
    synchronize(device)
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def set_mode(modules: Sequence[nn.Module], *, training: bool) -> None:
    for module in modules:
        module.train(training)


def matrix_product(trainer: Trainer) -> Workload:
    """A large matrix product: the peak that any network could reach.

    In the trainer's precision, but in fp32 where the device only emulates that: convolutions, which oneDNN
    computes in fp32 then, would be above their peak.
    """
    size = MATRIX_SIZE[trainer.device.type]
    dtype = (is_native(trainer.precision, trainer.device) and PRECISIONS[trainer.precision]) or torch.float32
    a, b = torch.randn(2, size, size, device=trainer.device).to(dtype)
    return Workload(lambda: a @ b, 2 * size**3)


def memory_copy(device: torch.device) -> Workload:
    """A copy within the device's memory, in bytes read and written: the most that it can move."""
    size = COPY_BYTES[device.type]
    source, target = torch.ones(2, size, dtype=torch.uint8, device=device)
    return Workload(lambda: target.copy_(source), 2 * size)
