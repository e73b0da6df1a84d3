"""What a training step asks of the device: memory, kernels, and how long the device waits for the host."""

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from okddip.tasks.benchmark.timing import set_mode, synchronize

TRACED_STEPS = 5
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace
HOST_CALLS = ("cuda_runtime", "cuda_driver")
LAUNCHES = ("LaunchKernel", "GraphLaunch")  # in names of the calls that start kernels: cudaLaunchKernelExC...

Event = dict[
    str, Any
]  # of a trace: its category `cat`, `name`, begin `ts` and duration `dur` in microseconds


def step_device_use(
    train_step: Callable[[], object], modules: Sequence[nn.Module], device: torch.device, seconds: float
) -> dict[str, float]:
    """How busy a GPU is with a training step; nothing on a CPU, or where the profiler sees no kernel.

    Args:
        train_step: was called before.
        seconds: that a step takes. Not those of the trace, in which the host is slowed down.
    """
    if device.type != "cuda":
        return {}
    set_mode(modules, training=True)
    return device_use(traced(train_step, device), TRACED_STEPS, seconds)


def traced(run: Callable[[], object], device: torch.device, times: int = TRACED_STEPS) -> list[Event]:
    """The trace of so many calls by PyTorch's profiler: what the device did, what the host asked for."""
    with profile(activities=[ProfilerActivity.CUDA]):
        run()  # the first trace of a process takes longer
        synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(times):
            run()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]


def device_use(events: Iterable[Event], steps: int, seconds: float) -> dict[str, float]:
    """What a trace of so many steps says of one, which takes so many seconds.

    Returns:
        `idle`, the share of the step in which no kernel and no copy runs; `waiting`, that without the pauses
        of the GPU itself, between two of them that the host had started in time;
        `kernels` that run; `launches`, calls of the host that start kernels, of which that of a CUDA graph
        starts many.
    """
    events = list(events)
    work = [event for event in events if event.get("cat") in DEVICE_WORK]
    kernels = sum(event["cat"] == "kernel" for event in work)
    if not kernels:
        return {}
    launches = sum(
        event.get("cat") in HOST_CALLS and any(name in event["name"] for name in LAUNCHES) for event in events
    )
    busy = covered((event["ts"], event["ts"] + event["dur"]) for event in work) / 1e6 / steps
    pauses = pauses_between(work, ends_of_calls(events)) / 1e6 / steps
    return {
        "idle": max(0.0, 1 - busy / seconds),
        "waiting": max(0.0, 1 - (busy + pauses) / seconds),
        "kernels": kernels / steps,
        "launches": launches / steps,
    }


def ends_of_calls(events: Iterable[Event]) -> dict[int, float]:
    """When the host had started what, by the number that a call shares with its kernels; a graph has many."""
    return {
        event["args"]["correlation"]: event["ts"] + event["dur"]
        for event in events
        if event.get("cat") in HOST_CALLS and "correlation" in event.get("args", {})
    }


def pauses_between(work: Iterable[Event], started: dict[int, float]) -> float:
    """How long a GPU runs nothing between two kernels of a graph, or before one that was started in time."""
    first, *others = sorted(work, key=lambda event: event["ts"])
    total, end, last = 0.0, first["ts"] + first["dur"], number_of(first)
    for event in others:
        number = number_of(event)
        if number is not None and (number == last or started.get(number, float("inf")) <= end):
            total += max(0.0, event["ts"] - end)
        end, last = max(end, event["ts"] + event["dur"]), number
    return total


def number_of(event: Event) -> int | None:
    return event.get("args", {}).get("correlation")


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals, which may overlap."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def overlap(some: Iterable[tuple[float, float]], others: Iterable[tuple[float, float]]) -> float:
    """How long two sets of intervals run at the same time."""
    some, others = list(some), list(others)
    return covered(some) + covered(others) - covered([*some, *others])


def forget_peak(device: torch.device) -> None:
    """Begin anew to look for the most memory that is taken."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most bytes that PyTorch's allocator gave to tensors, and took from the device; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
