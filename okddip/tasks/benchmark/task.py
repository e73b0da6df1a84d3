"""Task `benchmark`: how fast a configuration trains and evaluates, beside a plain training loop."""

import dataclasses
import gc
import json
import logging
import math
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from okddip import distributed
from okddip.data.options import check_options, image_shape
from okddip.data.sources import Source, Split
from okddip.errors import ConfigError, check_choice, check_number
from okddip.files import write_text
from okddip.run.parts import Parts
from okddip.run.references import find_checkpoint
from okddip.tasks.benchmark.measure import (
    Bench,
    Call,
    Spread,
    count,
    count_flops,
    matrix_product,
    memory,
    take_turns,
    uncompiled,
)
from okddip.tasks.benchmark.plain_loop import PilLoader, Reference
from okddip.training import checkpoint
from okddip.version import __version__

log = logging.getLogger(__name__)


TITLES = {
    "input": "input pipeline",
    "forward": "forward pass",
    "train": "training step",
    "evaluate": "evaluation",
}
EVALUATION_BATCHES = 2  # of the evaluation that is timed
MOST_BYTES = 200_000_000  # of synthetic images: more than caches hold, as a data set is


class Shape(NamedTuple):
    """What has to be known of a data set whose images are not read."""

    image_size: tuple[int, int]  # height, width
    channels: int
    classes: int


SHAPES = {
    "cifar10": Shape((32, 32), 3, 10),
    "cifar100": Shape((32, 32), 3, 100),
    "fashion_mnist": Shape((28, 28), 1, 10),
    "digits": Shape((8, 8), 1, 10),
    "imagenet": Shape((224, 224), 3, 1000),
}


def benchmark(config: DictConfig, build: Callable[[DictConfig], Parts]) -> float:
    """Time the input pipeline, the forward pass, the training step and the evaluation.

    Beside them, in turns, the same of a plain training loop (`plain_loop`); the ratio of the two is the
    result. Counts operators and host reads, measures memory, and with `benchmark.peers` what peers cost.

    Args:
        config: resolved; `benchmark` says how long is measured, the rest what.
        build: instantiates the parts of a configuration.

    Returns:
        How many times as fast as the plain loop the training step is; under torchrun, as the same ranks
        without averaging their gradients.

    Raises:
        ConfigError: a value is not allowed, or the shape of the data set's images is not known.
    """
    settings = config.benchmark
    check_settings(settings)
    # what is read here before `build` checks it
    check_number("trainer.batch_size", config.trainer.batch_size, minimum=1, integer=True)
    check_number("trainer.eval_batch_size", config.trainer.eval_batch_size, minimum=1, integer=True)
    check_options({"image_size": config.dataset.get("image_size")})
    shape, learned = shape_of(config)
    synthetic = with_synthetic_images(config, shape, learned)
    parts = build(synthetic)
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
        command=shlex.join(["okddip", *sys.argv[1:]]),
    )
    try:
        report = {
            "version": __version__,
            "torch": torch.__version__,
            "device": device_name(parts.trainer.device),
            "threads": torch.get_num_threads(),
            **{name: str(option) for name, option in config.options.items()},
            **{"peers": parts.method.peers, "structure": parts.method.structure},
            **{name: getattr(parts.trainer, name) for name in ("precision", "channels_last", "compile")},
            **{name: getattr(parts.trainer, name) for name in ("batch_size", "eval_batch_size")},
            **shape._asdict(),
        }
        with parts.trainer.within_memory():
            report |= (
                measure(parts, settings) if distributed.world_size() == 1 else measure_ranks(parts, settings)
            )
        if settings.peers:
            synthetic.trainer.device = str(parts.trainer.device)  # found already, and said so
            report |= cost_curve(synthetic, build, settings)
        (log_report if distributed.world_size() == 1 else log_ranks)(report)
        if settings.out and distributed.rank() == 0:
            write_text(Path(str(settings.out)), json.dumps(report, indent=2) + "\n")
            parts.tracker.log_artifact(Path(str(settings.out)))
        parts.tracker.log(flat_numbers(report), 0)
        for point in report.get("cost", ()):
            structure, peers, numbers = point["structure"], point["peers"], flat_numbers(point)
            del numbers["peers"]
            parts.tracker.log({f"cost/{structure}/{name}": x for name, x in numbers.items()}, peers)
    except BaseException as error:
        parts.tracker.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    parts.tracker.finish("FINISHED")
    return report["ratio"]["train"]["median"]


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
    if settings.peers and distributed.world_size() > 1:
        raise ConfigError(f"benchmark.peers={settings.peers}: is measured in one process, without torchrun.")
    for peers in settings.peers:
        check_number("benchmark.peers", peers, minimum=1, integer=True)
    if settings.out is not None:
        path = Path(str(settings.out))
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ConfigError(
                f"benchmark.out={path}: cannot be written. Name a file in a folder that exists and can be."
            )


def shape_of(config: DictConfig) -> tuple[Shape, dict[str, Any]]:
    """Size and channels of the images, how many classes; and the teacher's `classes`, `mean` and `std`.

    From the command line; else from the teacher that learned them, where there is one; else those of the
    data set as it is known.

    Raises:
        ConfigError: the data set is not known here, and the command line does not say.
    """
    known: dict[str, Any] = {}
    if config.dataset.name in SHAPES:
        known = SHAPES[config.dataset.name]._asdict()
    if config.dataset.get("image_size") is not None:
        known["image_size"] = image_shape(config.dataset.image_size)
    learned: dict[str, Any] = {}
    if config.method.get("teacher"):
        if config.method.teacher == "auto":
            raise ConfigError(
                "method.teacher=auto: task=benchmark trains no teacher. Name the checkpoint of one."
            )
        path = find_checkpoint("method.teacher", config.method.teacher, config.tracking.get("uri"))
        state = checkpoint.load(path)
        known = {name: state[name] for name in ("image_size", "channels")}
        known["classes"] = len(state["classes"])
        learned = {name: list(state[name]) for name in ("classes", "mean", "std")}
    given = {name: config.benchmark[name] for name in Shape._fields if config.benchmark[name] is not None}
    if "image_size" in given:
        given["image_size"] = image_shape(given["image_size"])
    for name in Shape._fields:
        if name not in known | given:
            raise ConfigError(
                f"benchmark.{name} is not given: dataset={config.options.dataset} does not say how large its"
                " images are or how many classes it has before it is read. Set benchmark.image_size,"
                " benchmark.channels and benchmark.classes."
            )
    height, width = (known | given)["image_size"]
    return Shape(**known | given | {"image_size": (height, width)}), learned


def with_synthetic_images(config: DictConfig, shape: Shape, learned: dict[str, Any]) -> DictConfig:
    """The configuration with random images in place of the data set's own; how they are loaded stays.

    Args:
        config: as composed.
        shape: of the images.
        learned: what a teacher learned from, if there is one: names of the classes, mean and std.
    """
    config = config.copy()
    height, width = shape.image_size
    most = min(50_000, MOST_BYTES // (height * width * shape.channels))
    batch = config.trainer.batch_size
    kept = ("name", "mean", "std", "pad", "flip", "on_device", "device_share")
    dataset = {key: config.dataset[key] for key in kept if config.dataset.get(key) is not None}
    dataset |= {key: learned[key] for key in ("mean", "std") if key in learned}
    classes = learned.get("classes", [])
    if len(classes) != shape.classes:
        classes = [str(i) for i in range(shape.classes)]
    if len(dataset.get("mean", [])) != shape.channels:
        dataset |= {"mean": [0.5] * shape.channels, "std": [0.25] * shape.channels}
    config.dataset = {
        "_target_": "okddip.data.dataset.Dataset",
        **dataset,
        "source": {
            "_target_": "okddip.tasks.benchmark.task.synthetic",
            "shape": [height, width, shape.channels],
            # names are no configuration: one may be written as an interpolation is
            "class_names": json.dumps(classes).replace("$", "\\u0024"),
            # whole batches: their sizes are what is measured
            "train": max(most // batch, math.ceil(shape.classes / batch)) * batch,
            "test": EVALUATION_BATCHES * config.trainer.eval_batch_size,
        },
    }
    return config


def synthetic(shape: Sequence[int], class_names: str, train: int, test: int) -> Source:
    """Random images of a shape, (height, width, channels); a source for `okddip.data.dataset.Dataset`.

    Args:
        shape: of an image.
        class_names: a list in JSON.
        train, test: numbers of images.
    """
    classes = json.loads(class_names)
    generator = torch.Generator().manual_seed(0)

    def split(size: int) -> Split:
        images = torch.randint(256, (size, *shape), dtype=torch.uint8, generator=generator)
        return Split(images, torch.arange(size) % len(classes))

    return Source(split(train), split(test), tuple(classes))


def measure(parts: Parts, settings: DictConfig) -> dict[str, Any]:
    """Speeds, counts, memory and the distance from the machine's peak of one configuration."""
    trainer = parts.trainer
    reference = Reference(parts.group, parts.method)
    pil = PilLoader(parts.dataset, trainer.batch_size)
    bench = Bench(parts)
    # the plain loop gets its batches for nothing
    images, labels = (plain(x) for x in bench.next_batch())
    eval_images, eval_labels = (plain(x) for x in bench.eval_batch)

    @torch.no_grad()
    def reference_forward() -> None:
        reference.forward(eval_images)

    def reference_step() -> None:
        reference.train_step(images, labels, bench.ramp)

    def reference_evaluation() -> None:
        for _ in range(EVALUATION_BATCHES):
            reference.evaluate(eval_images, eval_labels, bench.ramp)

    batch, eval_batch = trainer.batch_size, trainer.eval_batch_size
    calls = {
        ("input", "okddip"): Call(bench.next_batch, batch),
        ("input", "reference"): Call(pil.next_batch, batch),
        ("forward", "okddip"): Call(bench.forward, eval_batch),
        ("forward", "reference"): Call(reference_forward, eval_batch),
        ("train", "okddip"): Call(bench.train_step, batch),
        ("train", "reference"): Call(reference_step, batch),
        ("evaluate", "okddip"): Call(bench.evaluate, EVALUATION_BATCHES * eval_batch),
        ("evaluate", "reference"): Call(reference_evaluation, EVALUATION_BATCHES * eval_batch),
        ("peak", "machine"): matrix_product(trainer),
    }
    modules = [parts.group, parts.method, reference.group, reference.method]
    speeds = take_turns(calls, modules, trainer.device, settings)
    ratios = {
        part: [a / b for a, b in zip(speeds[part, "okddip"], speeds[part, "reference"], strict=True)]
        for part in TITLES
    }
    shares = [a / b for a, b in zip(speeds["evaluate", "okddip"], speeds["forward", "okddip"], strict=True)]

    # operators are counted where a dispatch mode sees them: not inside of what was compiled
    eager = Bench(dataclasses.replace(parts, trainer=uncompiled(trainer)))
    steps = {"okddip": eager.train_step, "reference": reference_step}
    evaluations = {
        "okddip": lambda: eager.evaluate_batches(iter([eager.eval_batch])),
        "reference": lambda: reference.evaluate(eval_images, eval_labels, bench.ramp),
    }
    flops = count_flops(eager, modules)
    step_speed = statistics.median(speeds["train", "okddip"]) / batch  # steps/s
    peak = statistics.median(speeds["peak", "machine"])
    return {
        "images_per_second": {
            who: {part: Spread.of(speeds[part, who])._asdict() for part in TITLES}
            for who in ("okddip", "reference")
        },
        "ratio": {part: Spread.of(ratios[part])._asdict() for part in TITLES},
        "evaluate_of_forward": Spread.of(shares)._asdict(),
        "train_step": {who: count(run, modules, training=True) for who, run in steps.items()},
        "evaluation_batch": {who: count(run, modules, training=False) for who, run in evaluations.items()},
        "memory": memory(bench),
        "flops": {
            "step": flops,
            "per_second": flops * step_speed,
            "peak_per_second": peak,
            "share_of_peak": flops * step_speed / peak,
        },
    }


def plain(batch: Tensor) -> Tensor:
    """A contiguous copy; with its strides too where one channel lies the same in all formats."""
    return torch.empty(batch.shape, dtype=batch.dtype, device=batch.device).copy_(batch)


def measure_ranks(parts: Parts, settings: DictConfig) -> dict[str, Any]:
    """Speeds of several ranks, beside those of ranks that do not average their gradients."""
    bench, apart = Bench(parts), Bench(parts, synchronised=False)
    batch, evaluated = parts.trainer.batch_size, EVALUATION_BATCHES * parts.trainer.eval_batch_size
    calls = {
        ("train", "together"): Call(bench.train_step, batch),
        ("train", "apart"): Call(apart.train_step, batch),
        ("evaluate", "together"): Call(bench.evaluate, evaluated),
    }
    speeds = take_turns(calls, [parts.group, parts.method], parts.trainer.device, settings)
    pairs = zip(speeds["train", "together"], speeds["train", "apart"], strict=True)
    learned = [*parts.group.parameters(), *parts.method.parameters()]
    return {
        "ranks": distributed.world_size(),
        "images_per_second": {
            "train": Spread.of(speeds["train", "together"])._asdict(),
            "train_apart": Spread.of(speeds["train", "apart"])._asdict(),
            "evaluate": Spread.of(speeds["evaluate", "together"])._asdict(),
        },
        "ratio": {"train": Spread.of([a / b for a, b in pairs])._asdict()},
        "reduced_bytes": sum(parameter.nbytes for parameter in learned),
    }


def cost_curve(
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
            points.append({"structure": structure, "peers": peers, **cost(build(varied), settings)})
        except ConfigError as error:
            left_out.append({"structure": structure, "peers": peers, "reason": str(error)})
        gc.collect()
    return {"cost": points, "left_out": left_out}


def cost(parts: Parts, settings: DictConfig) -> dict[str, Any]:
    """Time, memory and operations of a training step.

    Raises:
        ConfigError: the device's memory is full.
    """
    with parts.trainer.within_memory():
        bench = Bench(parts)
        modules = [parts.group, parts.method]
        calls = {("train", str(parts.method.peers)): Call(bench.train_step, parts.trainer.batch_size)}
        [speeds] = take_turns(calls, modules, parts.trainer.device, settings).values()
        eager = Bench(dataclasses.replace(parts, trainer=uncompiled(parts.trainer)))
        return {
            "step_seconds": Spread.of([parts.trainer.batch_size / x for x in speeds])._asdict(),
            "memory": memory(bench),
            "flops": count_flops(eager, modules),
        }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.backends.cpu.get_cpu_capability()}"


def flat_numbers(report: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested mappings, named like `ratio/train/median`."""
    flat: dict[str, float] = {}
    for key, value in report.items():
        if isinstance(value, Mapping):
            flat |= flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = value
    return flat


def heading(report: dict[str, Any]) -> list[str]:
    """What was measured, and on what."""
    compiled = ", compiled" if report["compile"] else ""
    return [
        f"{report['method']}, {report['peers']} peers ({report['structure']}), {report['model']},"
        f" {report['dataset']}; batches of {report['batch_size']} and {report['eval_batch_size']}",
        f"{report['device']}, {report['threads']} threads; {report['precision']}{compiled}; PyTorch"
        f" {report['torch']}",
        "",
    ]


def log_ranks(report: dict[str, Any]) -> None:
    """Print the table of several ranks."""
    titles = {
        "train": "training step",
        "train_apart": "  gradients not averaged",
        "evaluate": "evaluation",
    }
    title = f"images/s of {report['ranks']} ranks"
    rows = [*heading(report), f"{title:<28}{'':>10}{'quartiles':>20}"]
    for part, title in titles.items():
        speed = report["images_per_second"][part]
        rows.append(f"{title:<28}{speed['median']:>10,.0f}{speed['low']:>11,.0f} -{speed['high']:>7,.0f}")
    rows += [
        "",
        f"training step at {report['ratio']['train']['median']:.1%} of the speed without averaging;"
        f" {report['reduced_bytes'] / 1e6:,.1f} MB of gradients are averaged",
    ]
    log.info("\n".join(rows))


def log_report(report: dict[str, Any]) -> None:
    """Print the tables."""
    ours, reference = (report["images_per_second"][who] for who in ("okddip", "reference"))
    rows = [
        *heading(report),
        f"{'images/s':<16}{'':>10}{'quartiles':>20}{'reference':>12}{'ratio':>8}{'quartiles':>16}",
    ]
    for part, title in TITLES.items():
        speed, ratio = ours[part], report["ratio"][part]
        rows.append(
            f"{title:<16}{speed['median']:>10,.0f}{speed['low']:>11,.0f} -{speed['high']:>7,.0f}"
            f"{reference[part]['median']:>12,.0f}{ratio['median']:>8.2f}"
            f"{ratio['low']:>9.2f} -{ratio['high']:>5.2f}"
        )
    words = {"operators": "operators", "detaches": "of these detach", "host_reads": "host reads"}
    rows += ["", f"{'':<36}{'okddip':>10}{'reference':>12}"]
    for key, title in (("train_step", "training step"), ("evaluation_batch", "evaluation batch")):
        for name in ("operators", "detaches", "host_reads"):
            mine, theirs = report[key]["okddip"][name], report[key]["reference"][name]
            rows.append(f"{f'{title}, {words[name]}':<36}{mine:>10,}{theirs:>12,}")
    flops, size = report["flops"], report["memory"]
    rows += [
        "",
        f"evaluation at {report['evaluate_of_forward']['median']:.1%} of the forward pass's images/s",
        f"memory {size['model_bytes'] / 2**20:,.1f} MiB of parameters, buffers and optimizer state;"
        f" a training step adds up to {size['step_bytes'] / 2**20:,.1f} MiB",
        f"training step {flops['step'] / 1e9:,.1f} GFLOP, {flops['per_second'] / 1e9:,.1f} GFLOP/s,"
        f" {flops['share_of_peak']:.1%} of a matrix product's {flops['peak_per_second'] / 1e9:,.1f}",
    ]
    if "cost" in report:
        rows += ["", f"{'cost':<12}{'peers':>6}{'step, ms':>10}{'quartiles':>17}{'MiB':>10}{'GFLOP':>9}"]
    for point in report.get("cost", ()):
        step, size = point["step_seconds"], point["memory"]
        rows.append(
            f"{point['structure']:<12}{point['peers']:>6}{1000 * step['median']:>10,.1f}"
            f"{1000 * step['low']:>9,.1f} -{1000 * step['high']:>6,.1f}"
            f"{sum(size.values()) / 2**20:>10,.1f}{point['flops'] / 1e9:>9,.1f}"
        )
    for point in report.get("left_out", ()):
        rows.append(f"left out: {point['structure']}, {point['peers']} peers. {point['reason']}")
    log.info("\n".join(rows))
