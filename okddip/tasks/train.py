"""The task `train`: a run from its first epoch to its last, or from where it was interrupted."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from okddip import distributed, invocation
from okddip.assembly import PEERS
from okddip.data.dataset import Dataset
from okddip.data.weaknesses import weaknesses
from okddip.deployment.predictors import with_models
from okddip.errors import ConfigError
from okddip.files import writing
from okddip.methods.base import Method
from okddip.older_versions import FIRST_EPOCH
from okddip.run import resume
from okddip.run.cost import cost_tags
from okddip.run.folder import Run, RunFolder
from okddip.run.identity import fingerprint, identifying_settings, run_identity
from okddip.run.own_code import CODE
from okddip.run.parts import Parts
from okddip.run.same_run import check_same_data
from okddip.run.summary import log_run_summary, peers_tags, run_note, run_params, tracked_splits
from okddip.signals import stop_on_signals
from okddip.sweeps.environment import is_job, job_tags, objective, run_name, teacher_tags
from okddip.tasks import attention
from okddip.tasks.attention import write_attention
from okddip.tasks.threads import choose_threads
from okddip.text import for_terminal
from okddip.tracking.address import without_credentials
from okddip.tracking.status import log_how_to_open, tracked_to_the_end
from okddip.tracking.tracker import NoTracking
from okddip.training.threads import computing_with
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
        By what a sweeper may choose settings: `objective` after the last epoch, in percent.
    """
    _, history = train_run(config, build, teacher_folder)
    return objective(history["last"])


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
        with forgotten_if_refused(run):
            parts = build(config)
            digests = agreed_digests(parts.dataset)
            check_same_data(run, parts.dataset, digests)
        if distributed.rank() == 0:
            run.folder.update_metadata(data=fingerprint(digests), identity=run_identity(config))
        choose_threads(config, parts, run.state)
        log_run_summary(config, parts, run)
        for weakness in weaknesses(parts.dataset) if distributed.rank() == 0 else ():
            log.warning(weakness)
        with computing_with(parts.trainer.threads), tracked_to_the_end(parts.tracker):
            start_tracking(config, parts, run, digests, is_teacher=teacher_folder is not None)
            history = fit(config, parts, run, digests)
            log_table(history, parts.method, config.model.get(PEERS))
            log_results(config, parts, run, history)
            log_files(parts, run, None if teacher_folder else Path(HydraConfig.get().runtime.output_dir))
    if not (teacher_folder or is_job()):
        log_how_to_open(parts.tracker)
    return run, history


@contextmanager
def open_on_all_ranks(config: DictConfig, folder: Path, *, patient: bool) -> Iterator[Run]:
    """The run that rank 0 resumes or begins, for all ranks."""
    if distributed.rank() == 0:
        with resume.open_run(config, folder, patient=patient) as run:
            distributed.from_rank_0(lambda: (run.folder, run.state, run.first_epoch))
            yield run
    else:
        its_folder, state, first = distributed.from_rank_0(lambda: (RunFolder(folder), None, 1))
        yield Run(its_folder, state, first_epoch=first)


@contextmanager
def forgotten_if_refused(run: Run) -> Iterator[None]:
    """Let a new run that is refused before it begins be none: then its folder goes."""
    try:
        yield
    except ConfigError:
        if distributed.rank() == 0 and run.state is None and not run.reopened:
            (run.folder.path / "run.json").unlink(missing_ok=True)
        raise


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
            **peers_tags(config, parts.group),
            **cost_tags(parts.group, parts.method, (parts.dataset.channels, *parts.dataset.image_size)),
            "device": str(parts.trainer.device),
            "identity": run_identity(config),
            **({CODE: code} if (code := run.folder.metadata.get(CODE)) else {}),
            "folder": str(run.folder.path),
            FIRST_EPOCH: str(run.first_epoch),
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
        reported={
            number - run.first_epoch: (timestamp_ms, results) for number, timestamp_ms, results in finished
        },
        first_number=run.first_epoch,
    )


def log_results(config: DictConfig, parts: Parts, run: Run, history: dict[str, dict[str, float]]) -> None:
    """Log the accuracies of a finished run; write its attention, if it has any, into a file and a figure."""
    if distributed.rank() > 0:
        return
    last, best = history["last"], history["best"]
    results = {"final/top1": last["test/top1"], "best/top1": best["test/top1"]}
    # MLflow draws bars of what is at step 0 alone
    parts.tracker.log(results, 0, run.folder.result_timestamp())
    tags = {
        "best.epoch": f"{best['epoch'] + run.first_epoch:.0f}"
    }  # no metric, of which there would be a bar as well
    folder = run.folder.path
    with writing(folder):
        finished = run.folder.read_metrics()
        if matrices := write_attention([(n + 1 - run.first_epoch, t, row) for n, t, row in finished], folder):
            if not isinstance(parts.tracker, NoTracking):  # the figure is for its pages
                from okddip.tasks.report.attention import save_matrices  # imports Matplotlib

                save_matrices({str(config.seed): matrices}, config.name, folder / "attention.png")
            tags[attention.TAG] = "x".join(map(str, next(iter(matrices.values())).shape))
    parts.tracker.set_tags(tags)


def log_files(parts: Parts, run: Run, own_folder: Path | None) -> None:
    """Log the files of a finished run as artifacts.

    Args:
        own_folder: that Hydra made for this process; where the run was resumed it has a log of its own.
    """
    names = ["attention.csv", "attention.png", "main.log"]
    if parts.tracker.checkpoints:
        names += ["last.pt", "best.pt", "metrics.jsonl"]
    for path in (run.folder.path / name for name in names):
        if path.exists():  # a copied `last.pt` may have come alone
            parts.tracker.log_artifact(path)
    if own_folder is None or own_folder.absolute() == run.folder.path.absolute():
        return
    if (path := own_folder / "main.log").exists():
        parts.tracker.log_artifact(path, f"resumed/{own_folder.name}")


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


def log_table(
    history: dict[str, dict[str, float]], method: Method, models: Sequence[str] | None = None
) -> None:
    """Print every predictor's test top-1 at the last epoch and at the best.

    Args:
        models: of the peers, where they differ.
    """
    last, best = history["last"], history["best"]
    named = with_models(method, models) | {mean: mean for mean in method.means}
    named[method.primary] += " *"
    width = max(16, *(len(name) + 2 for name in named.values()))
    rows = [f"{'test top-1 (%)':<{width}}{'last epoch':>12}{'best epoch':>12}"]
    rows.append(f"{'':<{width}}{last['epoch'] + 1:>12.0f}{best['epoch'] + 1:>12.0f}")
    for predictor, name in named.items():
        key = f"test/{predictor}/top1"
        rows.append(f"{for_terminal(name):<{width}}{last[key]:>12.2f}{best[key]:>12.2f}")
    log.info("%s\n* primary", "\n".join(rows))
