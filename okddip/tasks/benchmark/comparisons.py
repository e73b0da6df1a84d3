"""What the benchmark measures: a configuration beside a plain training loop, on several ranks, by peers."""

import dataclasses
import gc
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from okddip import distributed
from okddip.assembly import NETWORKS, PEERS, name_of_models
from okddip.errors import ConfigError
from okddip.run.parts import Parts
from okddip.tasks.benchmark.counting import count_bytes, count_flops, count_operators, memory_use
from okddip.tasks.benchmark.device_use import step_device_use
from okddip.tasks.benchmark.plain_loop import PilLoader, PlainLoop
from okddip.tasks.benchmark.steps import TrainerSteps, uncompiled
from okddip.tasks.benchmark.synthetic import EVALUATION_BATCHES
from okddip.tasks.benchmark.timing import Workload, matrix_product, memory_copy, quartiles, time_in_turns

PARTS = ("input", "forward", "train", "evaluate")  # of a training, each timed by itself


def compare_with_plain_loop(parts: Parts, settings: DictConfig) -> dict[str, Any]:
    """Speeds, counts, memory and the distance from the machine's peak of one configuration."""
    trainer = parts.trainer
    plain_loop = PlainLoop(parts.group, parts.method)
    pil = PilLoader(parts.dataset, trainer.batch_size, parts.method.views)
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
        ("copy", "machine"): memory_copy(trainer.device),
    }
    modules = [parts.group, parts.method, plain_loop.group, plain_loop.method]
    speeds = time_in_turns(workloads, modules, trainer.device, settings)

    # operators are counted where a dispatch mode sees them: not inside of what was compiled
    eager = eager_steps(parts)
    train_steps = {"okddip": eager.train_step, "reference": plain_step}
    evaluations = {"okddip": eager.evaluate_batch, "reference": plain_evaluation_batch}
    counted = count_step(steps, parts, speeds)
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
        **counted,
    }


def count_step(
    steps: TrainerSteps, parts: Parts, speeds: Mapping[tuple[str, str], list[float]]
) -> dict[str, Any]:
    """The time of a training step, how busy the device is, and what it does beside what it could do.

    Operators are counted where a dispatch mode sees them: not inside of what was compiled. So the bytes are
    those of the step as it is before the compiler fuses operators, which is why its share of a copy is not
    given where it does.

    Args:
        steps: that were timed.
        parts: of the same configuration.
        speeds: of `train`, in images a second, of a matrix product and of a copy.
    """
    trainer, modules = parts.trainer, [parts.group, parts.method]
    eager = eager_steps(parts)
    seconds = quartiles([trainer.batch_size / speed for speed in speeds["train", "okddip"]])
    per_second = 1 / seconds["median"]
    product, copy = (statistics.median(speeds[name, "machine"]) for name in ("peak", "copy"))
    flops, moved = count_flops(eager, modules), count_bytes(eager, modules)
    use = step_device_use(steps.train_step, modules, trainer.device, seconds["median"])
    return {
        "step": {"seconds": seconds, **use},
        "flops": {
            "step": flops,
            "per_second": flops * per_second,
            "peak_per_second": product,
            "share_of_peak": flops * per_second / product,
        },
        "bytes": {
            "step": moved,
            "copy_per_second": copy,
            **({} if trainer.compile else {"share_of_copy": moved * per_second / copy}),
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

    The first point is the plain network; where peers differ, each of theirs. So many peers are then the first
    of `model.peers`. What the method refuses is left out, with its reason.
    """
    config = config.copy()
    config.tracking = {"_target_": "okddip.tracking.tracker.NoTracking"}
    points, left_out = [], []
    models = config.model.get(PEERS) or [config.options.model]
    structures = ("network",) if config.model.get(PEERS) else ("branch", "network")
    wanted = [(structure, peers, None) for structure in structures for peers in settings.peers]
    plain = [("baseline", 1, model) for model in dict.fromkeys(models)]
    for structure, peers, model in [*plain, *wanted]:
        if model is not None:
            method = {"_target_": "okddip.methods.baseline.Baseline", "peers": 1, "structure": "network"}
        else:
            method = {**config.method, "structure": structure, "peers": peers}
            if structure == "network" and "rescale" in method:
                method["rescale"] = False  # networks share nothing whose gradient could be rescaled
        varied = config.copy()
        varied.method = method
        named = varied_model(varied, peers, model)
        point = {"structure": structure, "peers": peers, **({"model": named} if named else {})}
        try:
            points.append({**point, **step_cost(build(varied), settings)})
        except ConfigError as error:
            left_out.append({**point, "reason": str(error)})
        gc.collect()
    return {"cost": points, "left_out": left_out}


def varied_model(config: DictConfig, peers: int, model: str | None) -> str | None:
    """Where peers differ, leave a configuration the first so many of their models, or one that is named.

    Returns:
        What is left is called; None where peers have one architecture.
    """
    names = config.model.get(PEERS)
    if names is None:
        return None
    if model is not None:
        config.model = config.model[NETWORKS][list(names).index(model)]
    else:
        config.model = {PEERS: names[:peers], NETWORKS: config.model[NETWORKS][:peers]}
    config.options.model = model or name_of_models(names[:peers], "")
    return config.options.model


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
            "parameters": sum(p.numel() for module in modules for p in module.parameters()),
            "step_seconds": quartiles([parts.trainer.batch_size / speed for speed in speeds]),
            "memory": memory_use(steps),
            "flops": count_flops(eager_steps(parts), modules),
        }
