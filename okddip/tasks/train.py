"""The task `train`: a run from its first epoch to its last, or from where it was interrupted."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from okddip import distributed, invocation
from okddip.data.dataset import Dataset
from okddip.data.weaknesses import weaknesses
from okddip.methods.base import Method
from okddip.run import resume
from okddip.run.folder import Run, RunFolder
from okddip.run.identity import fingerprint, identifying_settings, run_identity
from okddip.run.parts import Parts
from okddip.run.same_run import check_same_data
from okddip.run.summary import log_run_summary, run_note, run_params, tracked_splits
from okddip.signals import stop_on_signals
from okddip.sweeps.environment import is_job, job_tags, run_name, teacher_tags
from okddip.tracking.address import without_credentials
from okddip.tracking.status import tracked_to_the_end
from okddip.version import __version__

log = logging.getLogger(__name__)
# it reports at exit if a signal breaks off the import of what silences it
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.WARNING)


def train(
    config: DictConfig, build: Callable[[DictConfig], Parts], teacher_folder: Path | None = None
) -> float:
    """Train a group of peers, evaluate, checkpoint and log it; or resume a run that was interrupted.

    Args:
        config: resolved.
        build: instantiates the parts of a configuration.
        teacher_folder: of a teacher that a run trains for itself; a run of its own, and no job of a sweep.

    Returns:
        Top-1 of the primary predictor after the last epoch, in percent.
    """
    _, history = train_run(config, build, teacher_folder)
    return history["last"]["test/top1"]


def train_run(
    config: DictConfig, build: Callable[[DictConfig], Parts], teacher_folder: Path | None = None
) -> tuple[Run, dict[str, dict[str, float]]]:
    """What `train` does; gives the run, and the metrics of its last epoch and of its best.

    A run that is resumed has another folder than the one that Hydra made for it.
    """
    versions = {"okddip": __version__, "torch": torch.__version__}
    distributed.check_ranks_agree(versions | identifying_settings(config))
    folder = teacher_folder or Path(HydraConfig.get().runtime.output_dir)
    hint: AbstractContextManager[list[Run]] = (
        nullcontext([]) if teacher_folder else resume_hint_if_stopped(config)
    )
    patient = teacher_folder is not None or is_job()
    with hint as begun, stop_on_signals(), open_on_all_ranks(config, folder, patient=patient) as run:
        begun.append(run)
        parts = build(config)
        digests = agreed_digests(parts.dataset)
        check_same_data(run, parts.dataset, digests)
        if distributed.rank() == 0:
            run.folder.update_metadata(data=fingerprint(digests), identity=run_identity(config))
        log_run_summary(config, parts, run)
        for weakness in weaknesses(parts.dataset) if distributed.rank() == 0 else ():
            log.warning(weakness)
        with tracked_to_the_end(parts.tracker):
            start_tracking(config, parts, run, digests, is_teacher=teacher_folder is not None)
            history = fit(config, parts, run, digests)
            log_results(parts, run, history)
    log_table(history, parts.method)
    return run, history


@contextmanager
def open_on_all_ranks(config: DictConfig, folder: Path, *, patient: bool) -> Iterator[Run]:
    """The run that rank 0 resumes or begins, for all ranks."""
    if distributed.rank() == 0:
        with resume.open_run(config, folder, patient=patient) as run:
            distributed.from_rank_0(lambda: (run.folder, run.state))
            yield run
    else:
        yield Run(*distributed.from_rank_0(lambda: (RunFolder(folder), None)))


def agreed_digests(dataset: Dataset) -> dict[str, str]:
    """The digests of the splits of a data set, which all ranks must find the same."""
    digests = {split: dataset.digest(split) for split in dataset.sizes}
    distributed.check_ranks_agree(
        {f"the digest of its {split} images": digest for split, digest in digests.items()}
    )
    return digests


def start_tracking(
    config: DictConfig, parts: Parts, run: Run, digests: Mapping[str, str], *, is_teacher: bool
) -> None:
    """Start or resume the MLflow run, and log its settings, data sets and finished epochs."""
    tracker = parts.tracker
    resume.find_tracked_run(run, tracker, config.trainer.resume)
    tracking_id = tracker.start(
        name=f"teacher {config.name}" if is_teacher else run_name(config),
        params=run_params(config),
        tags={
            **{name: str(option) for name, option in config.options.items()},
            "peers": str(parts.method.peers),
            "structure": parts.method.structure,
            "seed": str(config.seed),
            **parts.teacher,
            "device": str(parts.trainer.device),
            "identity": run_identity(config),
            "folder": str(run.folder.path),
            **({} if run.tracking_id else run_note(config, parts)),  # which people may edit
            **(teacher_tags() if is_teacher else job_tags()),
        },
        config_yaml=OmegaConf.to_yaml(config),
        command=invocation.command(),
        run_id=run.tracking_id,
        store=run.store,
        anew=config.trainer.resume == "auto",  # another store than that of a named run may be a mistake
    )
    if tracking_id:
        store = without_credentials(config.tracking.uri)
        run.folder.update_metadata(tracking_id=tracking_id, store=store)
        tracker.log_datasets(tracked_splits(config, parts.dataset, digests))
    tracker.watch_system()
    for epoch, timestamp_ms, results in run.folder.read_metrics():
        tracker.log(results, epoch, timestamp_ms)


def fit(
    config: DictConfig, parts: Parts, run: Run, digests: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Train the remaining epochs; the metrics of the last epoch and of the best."""
    dataset = parts.dataset
    finished = run.folder.read_metrics()
    return parts.trainer.fit(
        group=parts.group,
        method=parts.method,
        optimizer=parts.optimizer,
        schedule=parts.schedule,
        dataset=dataset,
        tracker=parts.tracker,
        folder=run.folder.path,
        seed=config.seed,
        description={
            "version": __version__,
            "config": cast(dict[str, Any], OmegaConf.to_container(config)),
            "classes": list(dataset.classes),
            "channels": dataset.channels,
            "image_size": list(dataset.image_size),
            "mean": list(dataset.mean),
            "std": list(dataset.std),
            "digests": dict(digests),
        },
        state=run.state,
        reported={epoch: (timestamp_ms, results) for epoch, timestamp_ms, results in finished},
    )


def log_results(parts: Parts, run: Run, history: dict[str, dict[str, float]]) -> None:
    """Log the accuracies of a finished run, and its files as artifacts."""
    last, best = history["last"], history["best"]
    results = {
        "final/top1": last["test/top1"],
        "best/top1": best["test/top1"],
        "best/epoch": best["epoch"],
    }
    if distributed.rank() == 0:
        # MLflow draws bars of what is at step 0 alone
        parts.tracker.log(results, 0, run.folder.result_timestamp())
    if parts.tracker.checkpoints:
        for path in (run.folder.path / name for name in ("last.pt", "best.pt", "metrics.jsonl")):
            if path.exists():  # a copied `last.pt` may have come alone
                parts.tracker.log_artifact(path)


@contextmanager
def resume_hint_if_stopped(config: DictConfig) -> Iterator[list[Run]]:
    """Log how to resume the run, as the last line, if it is stopped.

    Yields:
        A list for the run, once it has begun.
    """
    begun: list[Run] = []
    try:
        yield begun
    except Exception:
        raise
    except BaseException:
        reference = config.trainer.resume or "auto"
        if reference != "auto" and begun:  # may have been begun elsewhere, or from a copy
            reference = str(begun[0].folder.path.absolute())
        hint = "Give the command of its sweep again to resume it."
        log.info("Stopped. %s", hint if is_job() else resume.resume_hint(reference))
        raise


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
