"""What the benchmark measures: a configuration beside a plain training loop, on several ranks, by peers."""

import dataclasses
import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from okddip import distributed
from okddip.errors import ConfigError
from okddip.run.parts import Parts
from okddip.tasks.benchmark.counting import count_flops, count_operators, memory_use
from okddip.tasks.benchmark.plain_loop import PilLoader, PlainLoop
from okddip.tasks.benchmark.steps import TrainerSteps, uncompiled
from okddip.tasks.benchmark.synthetic import EVALUATION_BATCHES
from okddip.tasks.benchmark.timing import Workload, matrix_product, quartiles, time_in_turns

PARTS = ("input", "forward", "train", "evaluate")  # of a training, each timed by itself


def compare_with_plain_loop(parts: Parts, settings: DictConfig) -> dict[str, Any]:
    """Speeds, counts, memory and the distance from the machine's peak of one configuration."""
    trainer = parts.trainer
    plain_loop = PlainLoop(parts.group, parts.method)
    pil = PilLoader(parts.dataset, trainer.batch_size)
    steps = TrainerSteps(parts)
    # the plain loop gets its batches for nothing
    images, labels = (contiguous_copy(x) for x in steps.next_batch())
    eval_images, eval_labels = (contiguous_copy(x) for x in steps.eval_batch)

    @torch.no_grad()
    def plain_forward() -> None:
        plain_loop.forward(eval_images)

    def plain_step() -> None:
        plain_loop.train_step(images, labels, steps.ramp)

    def plain_evaluation_batch() -> None:
        plain_loop.evaluate(eval_images, eval_labels, steps.ramp)

    def plain_evaluation() -> None:
        for _ in range(EVALUATION_BATCHES):
            plain_evaluation_batch()

    batch, eval_batch = trainer.batch_size, trainer.eval_batch_size
    workloads = {
        ("input", "okddip"): Workload(steps.next_batch, batch),
        ("input", "reference"): Workload(pil.next_batch, batch),
        ("forward", "okddip"): Workload(steps.forward, eval_batch),
        ("forward", "reference"): Workload(plain_forward, eval_batch),
        ("train", "okddip"): Workload(steps.train_step, batch),
        ("train", "reference"): Workload(plain_step, batch),
        ("evaluate", "okddip"): Workload(steps.evaluate, EVALUATION_BATCHES * eval_batch),
        ("evaluate", "reference"): Workload(plain_evaluation, EVALUATION_BATCHES * eval_batch),
        ("peak", "machine"): matrix_product(trainer),
    }
    modules = [parts.group, parts.method, plain_loop.group, plain_loop.method]
    speeds = time_in_turns(workloads, modules, trainer.device, settings)

    # operators are counted where a dispatch mode sees them: not inside of what was compiled
    eager = eager_steps(parts)
    train_steps = {"okddip": eager.train_step, "reference": plain_step}
    evaluations = {"okddip": eager.evaluate_batch, "reference": plain_evaluation_batch}
    flops = count_flops(eager, modules)
    flops_per_second = flops * statistics.median(speeds["train", "okddip"]) / batch
    peak = statistics.median(speeds["peak", "machine"])
    return {
        "images_per_second": {
            who: {part: quartiles(speeds[part, who]) for part in PARTS} for who in ("okddip", "reference")
        },
        "ratio": {
            part: quartiles(ratios(speeds[part, "okddip"], speeds[part, "reference"])) for part in PARTS
        },
        "evaluate_of_forward": quartiles(ratios(speeds["evaluate", "okddip"], speeds["forward", "okddip"])),
        "train_step": {who: count_operators(run, modules, training=True) for who, run in train_steps.items()},
        "evaluation_batch": {
            who: count_operators(run, modules, training=False) for who, run in evaluations.items()
        },
        "memory": memory_use(steps),
        "flops": {
            "step": flops,
            "per_second": flops_per_second,
            "peak_per_second": peak,
            "share_of_peak": flops_per_second / peak,
        },
    }


def contiguous_copy(batch: Tensor) -> Tensor:
    """A copy whose strides are contiguous too, which those of one channel need not be."""
    return torch.empty(batch.shape, dtype=batch.dtype, device=batch.device).copy_(batch)


def eager_steps(parts: Parts) -> TrainerSteps:
    """The same steps, not compiled."""
    return TrainerSteps(dataclasses.replace(parts, trainer=uncompiled(parts.trainer)))


def ratios(speeds: list[float], others: list[float]) -> list[float]:
    """How many times as fast as others, for each of their turns."""
    return [speed / other for speed, other in zip(speeds, others, strict=True)]


def compare_ranks(parts: Parts, settings: DictConfig) -> dict[str, Any]:
    """Speeds of several ranks, beside those of ranks that do not average their gradients."""
    steps, apart = TrainerSteps(parts), TrainerSteps(parts, average=False)
    batch = parts.trainer.batch_size
    workloads = {
        ("train", "together"): Workload(steps.train_step, batch),
        ("train", "apart"): Workload(apart.train_step, batch),
        ("evaluate", "together"): Workload(
            steps.evaluate, EVALUATION_BATCHES * parts.trainer.eval_batch_size
        ),
    }
    speeds = time_in_turns(workloads, [parts.group, parts.method], parts.trainer.device, settings)
    together, apart_speeds = speeds["train", "together"], speeds["train", "apart"]
    learned = [*parts.group.parameters(), *parts.method.parameters()]
    return {
        "ranks": distributed.world_size(),
        "images_per_second": {
            "train": quartiles(together),
            "train_apart": quartiles(apart_speeds),
            "evaluate": quartiles(speeds["evaluate", "together"]),
        },
        "ratio": {"train": quartiles(ratios(together, apart_speeds))},
        "reduced_bytes": sum(parameter.nbytes for parameter in learned),
    }


def cost_by_peers(
    config: DictConfig, build: Callable[[DictConfig], Parts], settings: DictConfig
) -> dict[str, Any]:
    """Time, memory and operations of a training step by structure and number of peers.

    The first point is the plain network. What the method refuses is left out, with its reason.
    """
    config = config.copy()
    config.tracking = {"_target_": "okddip.tracking.tracker.NoTracking"}
    points, left_out = [], []
    wanted = [(structure, peers) for structure in ("branch", "network") for peers in settings.peers]
    for structure, peers in [("baseline", 1), *wanted]:
        if structure == "baseline":
            method = {"_target_": "okddip.methods.baseline.Baseline", "peers": 1, "structure": "network"}
        else:
            method = {**config.method, "structure": structure, "peers": peers}
            if structure == "network" and "rescale" in method:
                method["rescale"] = False  # networks share nothing whose gradient could be rescaled
        varied = config.copy()
        varied.method = method
        try:
            points.append({"structure": structure, "peers": peers, **step_cost(build(varied), settings)})
        except ConfigError as error:
            left_out.append({"structure": structure, "peers": peers, "reason": str(error)})
        gc.collect()
    return {"cost": points, "left_out": left_out}


def step_cost(parts: Parts, settings: DictConfig) -> dict[str, Any]:
    """Time, memory and operations of a training step.

    Raises:
        ConfigError: the device's memory is full.
    """
    with parts.trainer.named_errors():
        steps = TrainerSteps(parts)
        modules = [parts.group, parts.method]
        workloads = {("train", str(parts.method.peers)): Workload(steps.train_step, parts.trainer.batch_size)}
        [speeds] = time_in_turns(workloads, modules, parts.trainer.device, settings).values()
        return {
            "step_seconds": quartiles([parts.trainer.batch_size / speed for speed in speeds]),
            "memory": memory_use(steps),
            "flops": count_flops(eager_steps(parts), modules),
        }
