"""What is done with model, method, optimizer and data set."""

import logging
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from okddip import distributed
from okddip.data.weaknesses import weaknesses
from okddip.methods.base import Method
from okddip.run import resume
from okddip.run.folder import Run, read_metrics, summary_timestamp, update_metadata
from okddip.run.identity import fingerprint, identifying_settings, run_identity
from okddip.run.parts import Parts
from okddip.run.summary import log_run_summary, run_note, run_params, tracked_splits
from okddip.signals import is_stopping, stop_on_signals, stops_deferred
from okddip.sweeps.environment import is_job, job_tags, run_name, teacher_tags
from okddip.tracking import tracker as tracking
from okddip.tracking.address import without_credentials
from okddip.version import __version__

log = logging.getLogger(__name__)
# it reports at exit if a signal breaks off the import of what silences it
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.WARNING)


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
    versions = {"okddip": __version__, "torch": torch.__version__}
    distributed.check_ranks_agree(versions | identifying_settings(config))
    folder = teacher_folder or Path(HydraConfig.get().runtime.output_dir)
    parting: AbstractContextManager[list[Run]] = (
        nullcontext([]) if teacher_folder else resume_hint_if_stopped(config)
    )
    patient = teacher_folder is not None or is_job()
    with parting as begun, stop_on_signals(), begin_together(config, folder, patient=patient) as run:
        begun.append(run)
        parts = build(config)
        digests = {split: parts.dataset.digest(split) for split in parts.dataset.sizes}
        distributed.check_ranks_agree(
            {f"the digest of its {split} images": word for split, word in digests.items()}
        )
        resume.refuse_other_data(run, parts.dataset, digests)
        lengths = resume.former_lengths(run, config, parts.schedule, parts.method.ramp)
        identity = run_identity(config, lengths)
        if distributed.rank() == 0:
            update_metadata(run, data=fingerprint(digests), identity=identity)
        settings = cast(dict[str, Any], OmegaConf.to_container(config))
        log_run_summary(config, parts, run)
        for weakness in weaknesses(parts.dataset) if distributed.rank() == 0 else ():
            log.warning(weakness)
        with tracked_to_the_end(parts.tracker):
            resume.find_tracked_run(run, parts.tracker, config.trainer.resume)
            tracking_id = parts.tracker.start(
                name=f"teacher {config.name}" if teacher_folder else run_name(config),
                params=run_params(config),
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
                    **({} if run.tracking_id else run_note(config, parts)),  # which people may edit
                    **(teacher_tags() if teacher_folder else job_tags()),
                },
                config_yaml=OmegaConf.to_yaml(config),
                command=shlex.join(["okddip", *sys.argv[1:]]),
                run_id=run.tracking_id,
                store=run.store,
                anew=config.trainer.resume
                == "auto",  # another store than that of a named run may be a mistake
            )
            if tracking_id:
                update_metadata(run, tracking_id=tracking_id, store=without_credentials(config.tracking.uri))
                parts.tracker.log_datasets(tracked_splits(config, parts.dataset, digests))
            parts.tracker.watch_system()
            finished = read_metrics(run.folder / "metrics.jsonl")
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
                    "version": __version__,
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
                timestamp_ms = summary_timestamp(run.folder / "metrics.jsonl")
                parts.tracker.log(summary, 0, timestamp_ms)  # MLflow draws bars of what is at step 0 alone
            if parts.tracker.checkpoints:
                for path in (run.folder / name for name in ("last.pt", "best.pt", "metrics.jsonl")):
                    if path.exists():  # a copied `last.pt` may have come alone
                        parts.tracker.log_artifact(path)
    log_table(history, parts.method)
    return last["test/top1"]


@contextmanager
def begin_together(config: DictConfig, folder: Path, *, patient: bool) -> Iterator[Run]:
    """The run that rank 0 takes up or begins, for all ranks."""
    if distributed.rank() == 0:
        with resume.open_run(config, folder, patient=patient) as run:
            distributed.from_rank_0(lambda: (run.folder, run.state))
            yield run
    else:
        yield Run(*distributed.from_rank_0(lambda: (folder, None)))


@contextmanager
def tracked_to_the_end(tracker: tracking.MLflow | tracking.NoTracking) -> Iterator[None]:
    """End the MLflow run as what it became: finished, failed, or killed by a signal at whatever moment."""
    try:
        try:
            yield
            tracker.finish("FINISHED")
        except Exception:
            if is_stopping():
                raise
            tracker.finish("FAILED")
            raise
    except BaseException as error:
        if is_stopping() or not isinstance(error, Exception):
            with stops_deferred():
                tracker.finish("FAILED" if distributed.another_failed() else "KILLED")
        raise


@contextmanager
def resume_hint_if_stopped(config: DictConfig) -> Iterator[list[Run]]:
    """Say so, as the last line, if the run is stopped; it belongs into the list when it has begun."""
    begun: list[Run] = []
    try:
        yield begun
    except Exception:
        raise
    except BaseException:
        reference = config.trainer.resume or "auto"
        if reference != "auto" and begun:  # may have been begun elsewhere, or from a copy
            reference = str(begun[0].folder.absolute())
        hint = "The command of its sweep, given again, goes on with it."
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
