"""Task `benchmark`: how fast a configuration trains and evaluates, beside a plain training loop."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from okddip import distributed, invocation
from okddip.data.options import check_options
from okddip.errors import ConfigError, check_choice, check_number
from okddip.files import write_text
from okddip.run.parts import Parts
from okddip.tasks.benchmark.comparisons import compare_ranks, compare_with_plain_loop, cost_by_peers
from okddip.tasks.benchmark.settings import ALL, compare_settings
from okddip.tasks.benchmark.synthetic import find_shape, with_synthetic_images
from okddip.tasks.benchmark.tables import log_rank_tables, log_tables
from okddip.tasks.threads import choose_threads
from okddip.tracking.status import tracked_to_the_end
from okddip.tracking.tracker import MLflow, NoTracking
from okddip.training.threads import computing_with
from okddip.version import __version__


def benchmark(config: DictConfig, build: Callable[[DictConfig], Parts]) -> float:
    """Time the input pipeline, the forward pass, the training step and the evaluation.

    The same parts of a plain training loop (`plain_loop`) are timed in turns with them. Counts operators and
    host reads, and measures memory; with `benchmark.peers` also what peers cost.

    Args:
        config: resolved; `benchmark` sets how long to measure, the rest sets what.
        build: instantiates the parts of a configuration.

    Returns:
        How many times as fast as the plain loop the training step is; under torchrun, as the same ranks
        without averaging their gradients.

    Raises:
        ConfigError: a value is not allowed, or the shape of the data set's images is not known.
    """
    settings = config.benchmark
    check_settings(settings)
    # these are used before `build` checks them
    check_number("trainer.batch_size", config.trainer.batch_size, minimum=1, integer=True)
    check_number("trainer.eval_batch_size", config.trainer.eval_batch_size, minimum=1, integer=True)
    check_options({"image_size": config.dataset.get("image_size")})
    shape, learned = find_shape(config)
    synthetic = with_synthetic_images(config, shape, learned)
    parts = build(synthetic)
    choose_threads(config, parts, None)
    with computing_with(parts.trainer.threads), tracked_to_the_end(parts.tracker):
        parts.tracker.start(
            name=config.name,
            params=cast(dict[str, Any], OmegaConf.to_container(config)),
            tags={
                "task": "benchmark",
                "folder": HydraConfig.get().runtime.output_dir,
                **{name: str(option) for name, option in config.options.items()},
                "device": str(parts.trainer.device),
            },
            config_yaml=OmegaConf.to_yaml(config),
            command=invocation.command(),
        )
        alone = distributed.world_size() == 1
        report = describe(config, parts) | shape._asdict()
        with parts.trainer.named_errors():
            report |= (compare_with_plain_loop if alone else compare_ranks)(parts, settings)
        save(report, settings.out)
        synthetic.trainer.device = str(parts.trainer.device)  # "auto" would be logged again
        if settings.peers:
            report |= cost_by_peers(synthetic, build, settings)
        if settings.settings:
            report["settings"] = []
            for point in compare_settings(synthetic, build, settings, parts.trainer.device):
                report["settings"].append(point)
                save(report, settings.out)  # compiling takes minutes, in which a run may be cut off
        (log_tables if alone else log_rank_tables)(report)
        if save(report, settings.out):
            parts.tracker.log_artifact(Path(str(settings.out)).expanduser())
        log_metrics(report, parts.tracker)
    return report["ratio"]["train"]["median"]


def save(report: dict[str, Any], file: str | None) -> bool:
    """Write all numbers to a file, if there is to be one, from rank 0."""
    if not file or distributed.rank() != 0:
        return False
    write_text(Path(str(file)).expanduser(), json.dumps(report, indent=2) + "\n")
    return True


def check_settings(settings: DictConfig) -> None:
    """Refuse what cannot be measured before anything is.

    Raises:
        ConfigError: names the key, the value and what is allowed.
    """
    check_number("benchmark.repeats", settings.repeats, minimum=1, integer=True)
    check_number("benchmark.warmup", settings.warmup, minimum=1, integer=True)
    check_number("benchmark.seconds", settings.seconds, minimum=0)
    if settings.channels is not None:
        check_choice("benchmark.channels", settings.channels, (1, 3))
    if settings.classes is not None:
        check_number("benchmark.classes", settings.classes, minimum=1, integer=True)
    if settings.image_size is not None:
        sides = settings.image_size if OmegaConf.is_list(settings.image_size) else [settings.image_size] * 2
        for side in sides:
            check_number("benchmark.image_size", side, minimum=1, integer=True)
        if len(sides) != 2:
            raise ConfigError(f"benchmark.image_size={sides}: must be one number, or [height, width].")
    if not OmegaConf.is_list(settings.peers):
        raise ConfigError(f"benchmark.peers={settings.peers}: must be a list, such as [2,3,4,6,8].")
    check_choice("benchmark.settings", settings.settings, (None, ALL))
    for key in ("peers", "settings"):
        if settings[key] and distributed.world_size() > 1:
            raise ConfigError(
                f"benchmark.{key}={settings[key]}: is measured in one process, without torchrun."
            )
    for peers in settings.peers:
        check_number("benchmark.peers", peers, minimum=1, integer=True)
    if settings.out is not None:
        path = Path(str(settings.out)).expanduser()
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ConfigError(
                f"benchmark.out={path}: cannot be written. Name a file in a folder that exists and can be."
            )


def describe(config: DictConfig, parts: Parts) -> dict[str, Any]:
    """What is measured, and on what."""
    device = parts.trainer.device
    cuda = device.type == "cuda"
    settings = ("precision", "channels_last", "compile", "batch_size", "eval_batch_size")
    return {
        "version": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device)
        if cuda
        else f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        **{name: str(option) for name, option in config.options.items()},
        "peers": parts.method.peers,
        "structure": parts.method.structure,
        **{name: getattr(parts.trainer, name) for name in settings},
    }


def log_metrics(report: dict[str, Any], tracker: MLflow | NoTracking) -> None:
    """Log all numbers to MLflow; of what peers cost, the number of peers is the step."""
    tracker.log(flat_numbers(report), 0)
    for point in report.get("cost", ()):
        numbers = flat_numbers({name: value for name, value in point.items() if name != "peers"})
        curve = f"cost/{point['structure']}"
        if point["peers"] == 1 and "model" in point:  # of several, each the plain network of a peer
            curve += f"/{point['model']}"
        tracker.log({f"{curve}/{name}": value for name, value in numbers.items()}, point["peers"])
    for point in report.get("settings", ()):
        tracker.log(flat_numbers(point, f"settings/{point['setting']}/"), 0)


def flat_numbers(report: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested mappings, named like `ratio/train/median`."""
    flat: dict[str, float] = {}
    for key, value in report.items():
        if isinstance(value, Mapping):
            flat |= flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = value
    return flat
