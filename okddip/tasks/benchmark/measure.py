"""How fast something is, how many operators it takes, how much memory: the instruments of the benchmark."""

import copy
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from okddip import distributed
from okddip.models.group import PeerGroup
from okddip.run.parts import Parts
from okddip.training import metrics
from okddip.training.epoch import evaluate_on
from okddip.training.trainer import PRECISIONS, Trainer, own_share

aten = torch.ops.aten
VALUES = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__)
HOST_READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal)
MATRIX = {"cpu": 2048, "cuda": 8192}  # side of the matrices whose product shows the machine's peak


class Bench:
    """A group of peers, trained and evaluated step by step with the means of `Trainer.fit`."""

    def __init__(self, parts: Parts, *, synchronised: bool = True) -> None:
        """
        Args:
            parts: what is trained.
            synchronised: whether several ranks average their gradients; else each trains for itself.
        """
        self.trainer, self.group, self.method = parts.trainer, parts.group, parts.method
        self.optimizer = parts.optimizer
        device, channels_last = self.trainer.device, self.trainer.channels_last
        self.trainer.set_backend_flags()
        self.network = network(self.trainer, self.group)
        share = own_share()
        self.train_one = self.trainer.train_step(
            self.group, self.method, self.optimizer, parts.dataset, average=synchronised
        )
        self.eval_forward = self.trainer.eval_step(self.group, self.method, parts.dataset)
        self.ramp = torch.ones((), device=device)
        loader = parts.dataset.train_loader(self.trainer.batch_size, device, 0, channels_last, share)
        self.train_batches = endless(loader.batches)
        self.eval_loader = parts.dataset.eval_loader(
            "test", self.trainer.eval_batch_size, device, channels_last, share
        )
        self.eval_batch = next(iter(self.eval_loader.batches()))
        self.sums: metrics.Sums | None = None

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Augmented images [B, C, H, W] and labels [B]."""
        return next(self.train_batches)

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The logits [P, B, K] of a batch of evaluation size, and nothing else."""
        return self.network(self.eval_batch[0])

    def train_step(self) -> None:
        """The input pipeline, an update of all parameters, the metrics of one batch."""
        self.update(*self.next_batch())

    def update(self, images: Tensor, labels: Tensor) -> None:
        """What a training step does with a batch."""
        self.sums = metrics.accumulate(self.sums, self.train_one(images, labels, self.ramp))

    def evaluate(self) -> dict[str, float]:
        """A whole evaluation: all batches of the test split, and the reading of its metrics."""
        return metrics.read(self.evaluate_batches(self.eval_loader.batches()), self.method)

    def evaluate_batches(self, batches: Iterator[tuple[Tensor, Tensor]]) -> metrics.Sums:
        """All of an evaluation that a batch takes part in."""
        return evaluate_on(self.group, self.method, self.eval_forward, batches, self.ramp)


def network(trainer: Trainer, group: PeerGroup) -> Callable[[Tensor], Tensor]:
    """The forward pass alone, with the trainer's precision and compilation."""
    dtype = PRECISIONS[trainer.precision]

    def forward(images: Tensor) -> Tensor:
        with torch.autocast(trainer.device.type, dtype=dtype, enabled=dtype is not None):
            return group(images).logits

    if trainer.compile:
        return torch.compile(forward, mode=trainer.compile_mode, dynamic=False)
    return forward


def endless(
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of epoch after epoch."""
    epoch = 0
    while True:
        yield from batches(epoch)
        epoch += 1


class Call(NamedTuple):
    """Something that is timed."""

    run: Callable[[], object]
    work: int  # how many images it processes, or how many floating-point operations it is


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)


def take_turns(
    calls: Mapping[tuple[str, str], Call],
    modules: Sequence[nn.Module],
    device: torch.device,
    settings: DictConfig,
) -> dict[tuple[str, str], list[float]]:
    """Time each call `repeats` times, in turns: what slows the machine for a while slows all of them.

    Args:
        calls: by what is measured and whose it is.
        modules: put into training mode for `train`, else into evaluation mode.
        device: waited for.
        settings: warmup, repeats and seconds of conf/task/benchmark.

    Returns:
        Work a second, [repeats] for each call.
    """
    times: dict[tuple[str, str], int] = {}
    speeds: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    with tqdm(
        total=len(calls) * (1 + settings.repeats), leave=False, disable=distributed.hide_progress_bar()
    ) as progress:
        for name, call in calls.items():
            progress.set_description(f"warm-up {' '.join(name)}")
            set_mode(modules, training=name[0] == "train")
            for _ in range(settings.warmup):
                call.run()
            once = seconds_of(call.run, 1, device)
            times[name] = distributed.from_rank_0(partial(repetitions, settings.seconds, once))
            progress.update()
        for _ in range(settings.repeats):
            for name, call in calls.items():
                progress.set_description(" ".join(name))
                set_mode(modules, training=name[0] == "train")
                speeds[name].append(call.work * times[name] / seconds_of(call.run, times[name], device))
                progress.update()
    return speeds


def repetitions(seconds: float, once: float) -> int:
    """How often to call what takes `once` seconds, to fill `seconds`."""
    return max(1, math.ceil(seconds / once))


def seconds_of(run: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds until the device has done so many calls."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def set_mode(modules: Sequence[nn.Module], *, training: bool) -> None:
    for module in modules:
        module.train(training)


def matrix_product(trainer: Trainer) -> Call:
    """A large matrix product in the trainer's precision: the peak that any network could reach."""
    size = MATRIX[trainer.device.type]
    dtype = PRECISIONS[trainer.precision] or torch.float32
    a, b = torch.randn(2, size, size, device=trainer.device).to(dtype)
    return Call(lambda: a @ b, 2 * size**3)


def uncompiled(trainer: Trainer) -> Trainer:
    trainer = copy.copy(trainer)
    trainer.compile = False
    return trainer


def count_flops(bench: Bench, modules: Sequence[nn.Module]) -> int:
    """Floating-point operations of the convolutions and matrix products of a training step."""
    set_mode(modules, training=True)
    with FlopCounterMode(display=False) as counter:
        bench.train_step()
    return counter.get_total_flops()


class ReadsOfValues(TorchFunctionMode):
    """Lists calls that read a tensor on the host, and on the CPU take no operator."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in VALUES:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Counts operators, and reads for which the host would wait for the device or copy between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.detaches = 0
        self.found: list[str] = []  # the reads
        self.values = ReadsOfValues(self.found)

    def __enter__(self) -> "Operators":
        self.values.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.values.__exit__(*error)

    @property
    def host_reads(self) -> int:
        return len(self.found)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        self.total += 1
        self.detaches += packet is aten.detach
        devices = {leaf.device for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        masked = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in tree_leaves(args[1])
        )
        if packet in HOST_READS or masked or len(devices) > 1:
            self.found.append(str(func))
        return result


def count(run: Callable[[], object], modules: Sequence[nn.Module], *, training: bool) -> dict[str, int]:
    """Operators, detaches among them, and host reads of a call, after one before that makes what it keeps."""
    set_mode(modules, training=training)
    run()
    with Operators() as operators:
        run()
    return {
        "operators": operators.total,
        "detaches": operators.detaches,
        "host_reads": operators.host_reads,
    }


def memory(bench: Bench) -> dict[str, int]:
    """Bytes of parameters, buffers and the optimizer's state, and the most a training step adds to them.

    Both count tensors alone. The addition is that of PyTorch's allocator: on CUDA by its own peak, on the
    CPU by the profiler's record of allocations; memory that libraries take for themselves is not seen.
    """
    set_mode([bench.group, bench.method], training=True)
    kept = [*bench.group.state_dict().values(), *bench.method.state_dict().values()]
    kept += [x for state in bench.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    device = bench.trainer.device
    batch = bench.next_batch()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        bench.update(*batch)
        added = torch.cuda.max_memory_allocated(device) - before
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports that there is no GPU
        with profile(profile_memory=True) as profiler:
            bench.update(*batch)
        events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        now = added = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            added = max(added, now)
    return {"model_bytes": sum(tensor.nbytes for tensor in kept), "step_bytes": added}
