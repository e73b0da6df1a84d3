"""What is done with model, method, optimizer and data set."""

import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer

import okddip
from okddip import distributed
from okddip.data.dataset import Dataset
from okddip.data.weaknesses import weaknesses
from okddip.methods.base import Method
from okddip.models.group import PeerGroup
from okddip.run import resume
from okddip.signals import asked_to_stop, stop_on_signals, unstopped
from okddip.sweeps import sweep
from okddip.text import for_markdown, for_terminal
from okddip.tracking import tracker as tracking
from okddip.training.schedules import Schedule
from okddip.training.trainer import Trainer

log = logging.getLogger(__name__)
# it reports at exit if a signal breaks off the import of what silences it
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.WARNING)


@dataclass
class Parts:
    """What a configuration was instantiated into."""

    trainer: Trainer
    tracker: tracking.MLflow | tracking.NoTracking
    dataset: Dataset
    group: PeerGroup
    method: Method
    optimizer: Optimizer
    schedule: Schedule
    teacher: Mapping[str, str] = field(default_factory=dict)  # tags that say what it is, if there is one


def train(
    config: DictConfig, build: Callable[[DictConfig], Parts], teacher_folder: Path | None = None
) -> float:
    """Train a group of peers, evaluate, checkpoint and log it; or go on with a run that was cut off.

    Args:
        config: resolved.
        build: instantiates the parts of a configuration.
        teacher_folder: of a teacher that a run trains for itself; a run of its own, and no job of a sweep.

    Returns:
        Top-1 of the primary predictor after the last epoch, in percent.
    """
    versions = {"okddip": okddip.__version__, "torch": torch.__version__}
    distributed.agree(versions | resume.settings(config))
    folder = teacher_folder or Path(HydraConfig.get().runtime.output_dir)
    parting: AbstractContextManager[list[resume.Run]] = (
        nullcontext([]) if teacher_folder else how_to_go_on(config)
    )
    patient = teacher_folder is not None or sweep.is_job()
    with parting as begun, stop_on_signals(), begin_together(config, folder, patient=patient) as run:
        begun.append(run)
        parts = build(config)
        digests = {split: parts.dataset.digest(split) for split in parts.dataset.sizes}
        distributed.agree({f"the digest of its {split} images": word for split, word in digests.items()})
        resume.refuse_other_data(run, parts.dataset, digests)
        lengths = resume.lengths_before(run, config, parts.schedule, parts.method.ramp)
        identity = resume.identity(config, lengths)
        if distributed.rank() == 0:
            resume.note(run, data=resume.fingerprint(digests), identity=identity)
        settings = cast(dict[str, Any], OmegaConf.to_container(config))
        describe(config, parts, run)
        for weakness in weaknesses(parts.dataset) if distributed.rank() == 0 else ():
            log.warning(weakness)
        with concluded(parts.tracker):
            resume.find_tracked(run, parts.tracker, config.trainer.resume)
            tracking_id = parts.tracker.start(
                name=f"teacher {config.name}" if teacher_folder else sweep.name_of_run(config),
                params=params_of(config),
                tags={
                    **{name: str(option) for name, option in config.options.items()},
                    "peers": str(parts.method.peers),
                    "structure": parts.method.structure,
                    "seed": str(config.seed),
                    **parts.teacher,
                    "device": str(parts.trainer.device),
                    "identity": identity,
                    **({"lengths": " ".join(map(str, lengths))} if lengths else {}),
                    "folder": str(run.folder),
                    **({} if run.tracking_id else description(config, parts)),  # which people may edit
                    **(sweep.tags_of_teacher() if teacher_folder else sweep.tags()),
                },
                config_yaml=OmegaConf.to_yaml(config),
                command=shlex.join(["okddip", *sys.argv[1:]]),
                run_id=run.tracking_id,
                store=run.store,
                anew=config.trainer.resume
                == "auto",  # another store than that of a named run may be a mistake
            )
            if tracking_id:
                resume.note(run, tracking_id=tracking_id, store=tracking.public(config.tracking.uri))
                parts.tracker.log_datasets(splits_of(config, parts.dataset, digests))
            parts.tracker.watch_system()
            finished = resume.finished_epochs(run.folder / "metrics.jsonl")
            for epoch, timestamp_ms, results in finished:
                parts.tracker.log(results, epoch, timestamp_ms)
            history = parts.trainer.fit(
                group=parts.group,
                method=parts.method,
                optimizer=parts.optimizer,
                schedule=parts.schedule,
                dataset=parts.dataset,
                tracker=parts.tracker,
                folder=run.folder,
                seed=config.seed,
                description={
                    "version": okddip.__version__,
                    "config": settings,
                    "lengths": lengths,
                    "classes": list(parts.dataset.classes),
                    "channels": parts.dataset.channels,
                    "image_size": list(parts.dataset.image_size),
                    "mean": list(parts.dataset.mean),
                    "std": list(parts.dataset.std),
                    "digests": digests,
                },
                state=run.state,
                reported={epoch: (timestamp_ms, results) for epoch, timestamp_ms, results in finished},
            )
            last, best = history["last"], history["best"]
            summary = {
                "final/top1": last["test/top1"],
                "best/top1": best["test/top1"],
                "best/epoch": best["epoch"],
            }
            if distributed.rank() == 0:
                timestamp_ms = resume.time_of_summary(run.folder / "metrics.jsonl")
                parts.tracker.log(summary, 0, timestamp_ms)  # MLflow draws bars of what is at step 0 alone
            if parts.tracker.checkpoints:
                for path in (run.folder / name for name in ("last.pt", "best.pt", "metrics.jsonl")):
                    if path.exists():  # a copied `last.pt` may have come alone
                        parts.tracker.log_artifact(path)
    log_table(history, parts.method)
    return last["test/top1"]


@contextmanager
def begin_together(config: DictConfig, folder: Path, *, patient: bool) -> Iterator[resume.Run]:
    """The run that rank 0 takes up or begins, for all ranks."""
    if distributed.rank() == 0:
        with resume.begin(config, folder, patient=patient) as run:
            distributed.from_rank_0(lambda: (run.folder, run.state))
            yield run
    else:
        yield resume.Run(*distributed.from_rank_0(lambda: (folder, None)))


@contextmanager
def concluded(tracker: tracking.MLflow | tracking.NoTracking) -> Iterator[None]:
    """End the MLflow run as what it became: finished, failed, or killed by a signal at whatever moment."""
    try:
        try:
            yield
            tracker.finish("FINISHED")
        except Exception:
            if asked_to_stop():
                raise
            tracker.finish("FAILED")
            raise
    except BaseException as error:
        if asked_to_stop() or not isinstance(error, Exception):
            with unstopped():
                tracker.finish("FAILED" if distributed.another_failed() else "KILLED")
        raise


@contextmanager
def how_to_go_on(config: DictConfig) -> Iterator[list[resume.Run]]:
    """Say so, as the last line, if the run is stopped; it belongs into the list when it has begun."""
    begun: list[resume.Run] = []
    try:
        yield begun
    except Exception:
        raise
    except BaseException:
        reference = config.trainer.resume or "auto"
        if reference != "auto" and begun:  # may have been begun elsewhere, or from a copy
            reference = str(begun[0].folder.absolute())
        log.info("Stopped. %s", resume.how_to_go_on(reference))
        raise


def params_of(config: DictConfig | dict[str, Any]) -> dict[str, str]:
    """What MLflow's columns and plots show of a configuration: all that tells runs apart, and no more.

    Named like overrides, `method=okddip method.peers=4`. Left out are places, how a run is logged and
    continued, and import paths that follow from the name of an option; `config.yaml` has them all.
    """
    flat = resume.settings(config)
    named = {key: value for key, value in flat.items() if not key.startswith("options.")}
    return {
        **{name: str(option) for name, option in config["options"].items()},
        **{key: value for key, value in named.items() if not is_implied(key, value)},
        **tracking.flatten({"dataset.root": config["dataset"].get("root")}),
    }


def is_implied(key: str, value: str) -> bool:
    group, _, name = key.rpartition(".")
    if name == "_target_" and value.startswith("okddip."):
        return group not in ("optimizer", "scheduler")  # whose option has no param of its own
    return name == "_partial_"


def splits_of(
    config: DictConfig, dataset: Dataset, digests: Mapping[str, str]
) -> dict[str, tracking.DatasetSplit]:
    """The splits of a data set for MLflow's own field."""
    root = config.dataset.get("source", config.dataset).get("root")
    place = dataset.name if root is None else str(Path(root).expanduser().absolute())
    return {
        split: tracking.DatasetSplit(dataset.name, digests[split], place, size)
        for split, size in dataset.sizes.items()
    }


def description(config: DictConfig, parts: Parts) -> dict[str, str]:
    """The tag that MLflow shows as the run's description, in Markdown."""
    items = [f"- **{what}** {for_markdown(text)}" for what, text in in_words(config, parts).items()]
    hint = "`okddip task=report report.run=ID` with this run's ID prints the command that reproduces it."
    return {"mlflow.note.content": "\n".join([*items, "", hint])}


def in_words(config: DictConfig, parts: Parts) -> dict[str, str]:
    """What the run is."""
    method, group, dataset, trainer = parts.method, parts.group, parts.dataset, parts.trainer
    plain = sum(parameter.numel() for parameter in group.extract(0).parameters())
    trained = sum(parameter.numel() for module in (group, method) for parameter in module.parameters())
    peers = f"{method.peers} peers ({method.structure})" if method.peers > 1 else "1 student"
    sizes = ", ".join(f"{size:,} {split}" for split, size in dataset.sizes.items())
    height, width = dataset.image_size
    ranks = f" and {distributed.ranks() - 1} more" if distributed.ranks() > 1 else ""
    compiled = f", compiled ({trainer.compile_mode})" if trainer.compile else ""
    images = f"images of {dataset.channels}x{height}x{width}"
    return {
        "method": f"{config.options.method}, {peers}",
        "model": f"{config.options.model}, {plain:,} parameters; trained together {trained:,}",
        "data set": f"{config.options.dataset}, {sizes} {images}, {len(dataset.classes)} classes",
        "device": f"{trainer.device}{ranks}, {trainer.precision}{compiled}",
    }


def describe(config: DictConfig, parts: Parts, run: resume.Run) -> None:
    """Say what the run is, before it begins."""
    words = in_words(config, parts)
    words["folder"] = f"{run.folder}" + (f"; {how_far(config, run.state)}" if run.state else "")
    log.info("\n".join(f"{what:<10} {for_terminal(text)}" for what, text in words.items()))


def how_far(config: DictConfig, state: dict[str, Any]) -> str:
    """What is left of a run that goes on from a checkpoint."""
    done = state["epoch"] + 1
    if done == config.trainer.epochs:
        return f"is finished after epoch {done}, so nothing is trained"
    return f"goes on after epoch {done}"


def log_table(history: dict[str, dict[str, float]], method: Method) -> None:
    """Print every predictor's test top-1 at the last epoch and at the best."""
    last, best = history["last"], history["best"]
    predictors = [*method.predictors, *(["mean"] if method.peers > 1 else [])]
    rows = [f"{'test top-1 (%)':<16}{'last epoch':>12}{'best epoch':>12}"]
    rows.append(f"{'':<16}{last['epoch'] + 1:>12.0f}{best['epoch'] + 1:>12.0f}")
    for predictor in predictors:
        key = f"test/{predictor}/top1"
        mark = " *" if predictor == method.primary else ""
        rows.append(f"{predictor + mark:<16}{last[key]:>12.2f}{best[key]:>12.2f}")
    log.info("%s\n* primary", "\n".join(rows))
