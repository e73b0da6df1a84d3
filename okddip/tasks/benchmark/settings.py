"""The settings of the trainer that make it faster, each by itself on the same configuration."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from omegaconf import DictConfig
from torch._inductor.utils import fresh_inductor_cache

from okddip.errors import ConfigError
from okddip.run.parts import Parts
from okddip.tasks.benchmark.comparisons import count_step
from okddip.tasks.benchmark.device_use import forget_peak, peak_memory
from okddip.tasks.benchmark.steps import TrainerSteps
from okddip.tasks.benchmark.timing import (
    Workload,
    matrix_product,
    memory_copy,
    quartiles,
    set_mode,
    synchronize,
    time_in_turns,
)
from okddip.training.precision import is_native

ALL = "all"


def settings_for(device: torch.device) -> dict[str, dict[str, Any]]:
    """The settings that make sense on a device, from simple to fast: by name, a few keys of `trainer`."""
    settings: dict[str, dict[str, Any]] = {"fp32": {"precision": "fp32", "tf32": False, "compile": False}}
    if device.type == "cuda":
        settings["TF32"] = {"precision": "fp32", "tf32": True, "compile": False}
    fastest = "fp32"
    if is_native("bf16", device):
        fastest = "bf16"
        settings[fastest] = {"precision": fastest, "compile": False}
    compiled = {"precision": fastest, "compile": True, "compile_mode": "default"}
    settings[f"{fastest} compiled"] = compiled
    if device.type == "cuda":
        settings[f"{fastest} CUDA graphs"] = {**compiled, "compile_mode": "reduce-overhead"}
    return settings


def compare_settings(
    config: DictConfig, build: Callable[[DictConfig], Parts], settings: DictConfig, device: torch.device
) -> Iterator[dict[str, Any]]:
    """A training step under each of the settings, with its `setting`; or the `reason` why there is none."""
    for name, changes in settings_for(device).items():
        varied = config.copy()
        varied.tracking = {"_target_": "okddip.tracking.tracker.NoTracking"}
        varied.trainer.update(changes)
        # what another setting or run has compiled would make the first step look quick
        with fresh_inductor_cache() if varied.trainer.compile else nullcontext():
            try:
                point = measure_step(build(varied), settings)
            # the latter are the compiler's
            except (ConfigError, RuntimeError) as error:
                point = {"reason": str(error)}
        yield {"setting": name, **point}
        gc.collect()


def measure_step(parts: Parts, settings: DictConfig) -> dict[str, Any]:
    """Time and memory of a training step, beside what the device can do.

    Raises:
        ConfigError: the device's memory is full.
    """
    trainer, modules = parts.trainer, [parts.group, parts.method]
    with trainer.named_errors():
        forget_peak(trainer.device)
        steps = TrainerSteps(parts)
        synchronize(trainer.device)
        started = time.perf_counter()
        set_mode(modules, training=True)
        steps.train_step()
        synchronize(trainer.device)
        first = time.perf_counter() - started
        for _ in range(settings.warmup):
            steps.train_step()
        peak = peak_memory(trainer.device)  # before that of what it is compared with
        workloads = {
            ("train", "okddip"): Workload(steps.train_step, trainer.batch_size),
            ("peak", "machine"): matrix_product(trainer),
            ("copy", "machine"): memory_copy(trainer.device),
        }
        speeds = time_in_turns(workloads, modules, trainer.device, settings)
        return {
            "images_per_second": quartiles(speeds["train", "okddip"]),
            "first_step_seconds": first,  # what is compiled is compiled in it
            "memory": peak,
            **count_step(steps, parts, speeds),
        }
