"""Sweeps: one parent run in MLflow, jobs that are not done twice, and what became of each.

A sweep begins in a callback of Hydra and ends in the console command, since Hydra calls no callback at the
end of a sweep that broke off. Between the two, jobs run in this process, in joblib's or on a cluster: they
learn of their sweep from the environment, and leave what became of them in a file of their output folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import re
import shlex
import sys
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from filelock import FileLock, Timeout
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from okddip.errors import ConfigError, Incompatible
from okddip.signals import unstopped
from okddip.text import for_markdown, for_terminal
from okddip.tracking.outbox import LOCK

if TYPE_CHECKING:  # sweeps begin before anything heavy is imported
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    from okddip.tracking.tracker import MLflow, NoTracking

log = logging.getLogger(__name__)

# reach the jobs under any launcher
NAME, PARENT_RUN, START = "OKDDIP_SWEEP", "OKDDIP_PARENT_RUN", "OKDDIP_SWEEP_START"
PROCESS = "OKDDIP_SWEEP_PROCESS"
TRAINED_FOR = "trained_for"  # the tag of a teacher: the parent run
UNNAMED = "OKDDIP_SWEEP_UNNAMED"  # what is swept and does not show in the setting `name`

TRAIN = "okddip.tasks.train.train"

GOOD = {"finished", "finished before", "skipped"}  # outcomes
FINISHED_BEFORE, IDS_IN_A_TAG = "finished_before", 200  # MLflow's tags hold 8,000 letters

PATIENCE = 5.0  # seconds for a killed process to be gone

LONGEST_VALUE = 24  # letters of a value in the name of a run

NO_CHDIR = (
    "hydra.job.chdir=true: would make another place of each relative path, and another store of each run's"
    " tracking.uri. Leave it out; a run's files are in its output folder in any case."
)

GRID = "hydra_plugins.okddip.GridSweeper"

# what a job without a result returns: the worst value, for a sweeper that maximizes
NO_RESULT = float("-inf")


@dataclass
class Sweep:
    """The sweep of this process."""

    name: str
    folder: Path
    outlived: bool = False  # by its jobs, if it is stopped
    tracker: MLflow | NoTracking | None = None  # None: jobs that are no training runs have no parent
    jobs: list[list[str]] = field(default_factory=list)  # overrides of each, where they are known beforehand
    left_out: list[Outcome] = field(default_factory=list)  # of jobs that cannot be
    forced: bool = False  # all jobs are trained, whatever was finished before
    held: FileLock | None = None  # as long as the sweep goes on


@dataclass
class Outcome:
    """What became of a job."""

    job: int
    overrides: list[str]
    kind: str  # finished, finished before, skipped, failed, cut off, not started
    reason: str = ""
    run_id: str = ""  # of the MLflow run that finished before
    value: float | None = None  # what the job returned
    start: str = ""  # of the sweep: it may have been started more than once, and others in its folder


# Hydra hands nothing from its callbacks to the console command.
_begun: Sweep | None = None


class BeginSweep(Callback):
    """Begins a sweep. Hydra ignores exceptions of callbacks; leaving is none."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global _begun
        try:
            _begun = begin(config)
            hold(_begun)
            if config.hydra.sweeper._target_ != GRID:  # which first looks what the jobs are
                open_parent(_begun, config)
        except ConfigError as error:
            print(error, file=sys.stderr)
            raise SystemExit(1) from None
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None


def begin(config: DictConfig) -> Sweep:
    """Name a sweep.

    Args:
        config: of the sweep, with Hydra's own part; what is swept has its default here.

    Raises:
        ConfigError: something is asked for that no sweep does.
    """
    _, swept = overrides_of(config)
    if config.hydra.job.chdir:
        raise ConfigError(NO_CHDIR)
    if "multirun_presets" in swept:
        raise ConfigError(
            f"multirun_presets={swept['multirun_presets']}: a preset is a sweep of its own. Give one command"
            " for each."
        )
    sweeper, training = config.hydra.sweeper, config.task._target_ == TRAIN
    direction = getattr(sweeper.get("direction"), "name", sweeper.get("direction"))
    if training and sweeper._target_.endswith("OptunaSweeper") and direction == "minimize":
        raise ConfigError(
            "hydra.sweeper.direction=minimize: a training run returns its accuracy, and Optuna would look for"
            " the worst. Add hydra.sweeper.direction=maximize."
        )
    os.environ[START], os.environ[PROCESS] = uuid.uuid4().hex, str(os.getpid())
    name = config.hydra.runtime.choices.get("multirun_presets") or " x ".join(swept) or "sweep"
    submitit = "submitit" in config.hydra.launcher._target_
    return Sweep(name, Path(config.hydra.sweep.dir).absolute(), outlived=submitit)


def overrides_of(config: DictConfig) -> tuple[dict[str, str], dict[str, str]]:
    """All overrides of a sweep, those that it is configured with among them; and what is swept."""
    overrides: dict[str, str] = {}
    swept: dict[str, str] = {}
    for override in parsed_overrides(config):
        key, _, value = (override.input_line or "").partition("=")
        key = key.lstrip("+")
        overrides[key] = value
        swept.pop(key, None)
        if override.is_sweep_override():
            swept[key] = value
    return overrides, swept


def parsed_overrides(config: DictConfig) -> list[Override]:
    """All overrides of a sweep, in the order of Hydra's sweepers: of several for one key the last counts."""
    given = OmegaConf.select(config, "hydra.sweeper.params") or {}
    lines = [f"{key}={value}" for key, value in given.items()] + list(config.hydra.overrides.task)
    return OverridesParser.create(config_loader=GlobalHydra.instance().config_loader()).parse_overrides(lines)


def open_parent(sweep: Sweep, config: DictConfig) -> None:
    """Open the parent run of a sweep, or that of the same sweep when it ran before.

    Args:
        sweep: just begun.
        config: of the sweep, with Hydra's own part; what is swept has its default here.

    Raises:
        ConfigError: the store cannot be opened.
    """
    if config.task._target_ != TRAIN:
        return
    # the same sweep, wherever it is started and whatever is told of it
    from okddip.run.resume import FOLDERS, PLACES, PLACES_OF_DATA, alike

    overrides, swept = overrides_of(config)
    choices, method = config.hydra.runtime.choices, config.method
    groups = {group: swept.get(group, choices[group]) for group in ("method", "model", "dataset")}
    # (what several methods share is named by their own settings in a job, and here by itself)
    places = [place for place in PLACES if place != "methods."]
    places += [f"dataset.{key}" for key in PLACES_OF_DATA]
    settings = sorted(
        f"{key}={alike(key, value)}"
        for key, value in overrides.items()
        if not key.startswith((*places, "tracking"))
    )
    if set(datasets(config)) & set(FOLDERS):  # each folder is a data set of its own
        root = swept.get("dataset.root") or Path(str(config.dataset.root)).expanduser().absolute()
        settings.append(f"dataset.root={root}")
    if config.trainer.rerun:
        settings.append("trainer.rerun=true")
    identity = hashlib.sha256(json.dumps([sweep.name, *settings]).encode()).hexdigest()[:16]
    tracker = instantiate(config.tracking)
    tracker.open()
    parents = tracker.find({"kind": "sweep"})
    same = [parent for parent in parents if parent.data.tags.get("identity") == identity]
    sweep.forced = bool(config.trainer.rerun)
    if sweep.forced:  # one that came to its end is forced anew, one that was cut off goes on
        same = [parent for parent in same if parent.info.status in ("RUNNING", "KILLED")]
    own = "each method's own"
    with unstopped():  # a run that has begun must be known, to be ended
        sweep.tracker = tracker
        run_id = tracker.start(
            name=sweep.name,
            params={f"sweep.{key}": values for key, values in swept.items()},
            tags={
                "kind": "sweep",
                "sweep": sweep.name,
                "identity": identity,
                "folder": str(sweep.folder),
                LOCK: sweep.held.lock_file if sweep.held else "",
                **groups,
                "structure": swept.get("method.structure", own if "method" in swept else method.structure),
                "peers": swept.get("method.peers", own if "method" in swept else str(method.peers)),
                "seed": swept.get("seed", str(config.seed)),
                **({} if same else {"mlflow.note.content": description(swept)}),  # which people may edit
            },
            config_yaml=OmegaConf.to_yaml(
                OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            ),
            command=shlex.join(["okddip", *sys.argv[1:]]),
            run_id=same[0].info.run_id if same else None,
        )
        os.environ[NAME], os.environ[PARENT_RUN] = sweep.name, run_id
        os.environ[UNNAMED] = " ".join(key for key in swept if key not in named_by(config))


def hold(sweep: Sweep) -> None:
    """Hold the folder of a sweep, and show others that it goes on, until its process ends, however it ends.

    Raises:
        ConfigError: another sweep goes on in this folder; its jobs' folders may have the same names.
    """
    sweep.folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(sweep.folder / f"sweep-{os.environ[START][:8]}.lock")
    with suppress(OSError, NotImplementedError):  # a file system without locks
        with FileLock(sweep.folder / ".sweep.lock", timeout=PATIENCE):  # one sweep at a time looks, and holds
            if any(goes_on(lock) for lock in sweep.folder.glob("sweep-*.lock")):
                raise ConfigError(
                    f"hydra.sweep.dir={sweep.folder}: another sweep goes on in this folder, and each would"
                    " write over what the other's jobs leave. Name another folder, or leave hydra.sweep.dir"
                    " out: jobs that both have are trained once in any case. Or wait for the other's end."
                    " (If there is none, remove sweep-*.lock there.)"
                )
            held.acquire(timeout=0)
        sweep.held = held


def goes_on(lock: Path) -> bool:
    """Whether the process of a sweep lives that holds this file."""
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def let_go(sweep: Sweep) -> None:
    if sweep.held is not None:
        Path(sweep.held.lock_file).unlink(missing_ok=True)
        sweep.held.release()


def datasets(config: DictConfig) -> list[str]:
    """The options of the group `dataset` that a sweep takes."""
    chosen = [override for override in parsed_overrides(config) if override.key_or_group == "dataset"]
    if not (chosen and chosen[-1].is_discrete_sweep()):
        return [str(config.hydra.runtime.choices.dataset)]
    return [str(getattr(option, "text", option)) for option in chosen[-1].sweep_iterator()]


def named_by(config: DictConfig) -> set[str]:
    """The keys and groups that the setting `name` refers to."""
    name = str(OmegaConf.to_container(config, resolve=False)["name"])  # type: ignore[call-overload, index]
    keys = set(re.findall(r"\$\{([^}]+)\}", name))
    return {key.removeprefix("options.").removeprefix("hydra:runtime.choices.") for key in keys}


def description(swept: Mapping[str, str]) -> str:
    """What a sweep varies, in Markdown."""
    items = [f"- **{for_markdown(key)}** {for_markdown(v.replace(',', ', '))}" for key, v in swept.items()]
    return "\n".join(["A sweep; its jobs are the child runs.", "", *items])


def expect(config: DictConfig, jobs: list[list[str]], left_out: list[Outcome]) -> None:
    """Open the parent run of this process's sweep, now that its jobs are known.

    Args:
        config: of the sweep.
        jobs: their overrides.
        left_out: combinations that cannot be.
    """
    if _begun is not None:
        open_parent(_begun, config)
        numbered = [replace(outcome, job=len(jobs) + more) for more, outcome in enumerate(left_out)]
        _begun.jobs, _begun.left_out = jobs, numbered


def outcomes() -> list[Outcome]:
    """What has become of the jobs of this process's sweep up to now."""
    return [] if _begun is None else outcomes_in(_begun.folder, os.environ.get(START, ""))


def tags() -> dict[str, str]:
    """What a job's run says of its sweep."""
    tags = {"sweep": os.environ.get(NAME, ""), "mlflow.parentRunId": os.environ.get(PARENT_RUN, "")}
    return {key: value for key, value in tags.items() if value}


def tags_of_teacher() -> dict[str, str]:
    """What the run of a teacher that a job trains says of the sweep; it is no child of the parent."""
    parent = os.environ.get(PARENT_RUN, "")
    return {TRAINED_FOR: parent} if parent else {}


def name_of_run(config: DictConfig) -> str:
    """What a run is called in MLflow: its name, in a sweep after what the name does not show.

    Ahead of it, since MLflow's column of names shows their beginnings.
    """
    unnamed = os.environ.get(UNNAMED, "").split()
    task = HydraConfig.get().overrides.task
    given = dict(override.lstrip("+").split("=", 1) for override in task if "=" in override)
    words = [f"{key.rpartition('.')[2]}={shortened(given[key])}" for key in unnamed if key in given]
    return " ".join([*words, config.name])


def shortened(value: str) -> str:
    """The end of a long value: that of a path tells more than its beginning."""
    return value if len(value) <= LONGEST_VALUE else f"...{value[3 - LONGEST_VALUE :]}"


def is_job() -> bool:
    """Whether what runs is a job of a sweep."""
    return not OmegaConf.is_missing(HydraConfig.get().job, "num")


def gpu_in_turn(gpus: int) -> int | None:
    """Which of the visible GPUs a job takes that joblib runs beside others; None for any other run.

    Jobs take them in turn: of four, job 6 of a sweep takes GPU 2. It is no setting, so a job is the same on
    any of them. CUDA_VISIBLE_DEVICES would not do: CUDA reads it once, and joblib's processes run job after
    job. Launchers for clusters give each job GPUs of its own.
    """
    if not HydraConfig.initialized() or not is_job():
        return None
    return HydraConfig.get().job.num % gpus if is_joblibs() else None


def is_joblibs() -> bool:
    return str(HydraConfig.get().launcher._target_).endswith("JoblibLauncher")


# held by this process while it works on a job
_working = threading.Lock()


@contextmanager
def at_work() -> Iterator[None]:
    """Within, a process of joblib's has a job; without one it ends when that of the sweep was killed.

    Joblib would keep it waiting for good, with all of its memory and that of a GPU.
    """
    sweep = os.environ.get(PROCESS)
    if is_joblibs() and sweep and int(sweep) != os.getpid():  # with n_jobs=1 jobs run in the sweep's own
        end_with(int(sweep))
    with _working:
        yield


@cache
def end_with(sweep: int) -> None:
    """End this process, a child of the sweep's, after its job when that one is gone."""

    def watch() -> None:
        while os.getppid() == sweep:
            time.sleep(PATIENCE)
        with _working:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@at_work()
def job(config: DictConfig, check: Callable[[DictConfig], None], task: Callable[[DictConfig], Any]) -> Any:
    """Run a job of a sweep so that, whatever becomes of it, the others run too.

    A training run that is finished is not trained again, one that was cut off goes on.

    Args:
        config: of the job.
        check: resolves and checks it.
        task: what to do.

    Returns:
        What the task returns; minus infinity if it failed or was skipped.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    outcome = Outcome(
        HydraConfig.get().job.num,
        list(HydraConfig.get().overrides.task),
        "cut off",
        f"its process has not come to its end; see {folder}",
        start=os.environ.get(START, ""),
    )
    write(outcome, folder)
    outcome.kind, outcome.reason = "finished", ""
    value: Any = NO_RESULT
    try:
        check(config)
        # where it is forced, only what this very sweep has done counts
        parent = os.environ.get(PARENT_RUN, "") if config.trainer.rerun else None
        if config.task._target_ == TRAIN:
            with only_one(config):
                run = next(finished_runs(config, parent=parent), None)
                if run is not None:
                    outcome.kind, outcome.run_id = "finished before", run.info.run_id
                    value = run.data.metrics["final/top1"]
                    log.info("%s: finished before, as MLflow run %s.", config.name, run.info.run_id)
                else:
                    if config.trainer.resume is None:
                        config.trainer.resume = "auto" if parent is None else cut_off(config, parent)
                    value = task(config)
        else:
            value = task(config)
    except Incompatible as error:
        outcome.kind, outcome.reason = "skipped", str(error)
        log.info("Skipped: %s", error)
    except ConfigError as error:
        outcome.kind, outcome.reason = "failed", str(error)
        log.error("%s", error)
    except Exception as error:
        outcome.kind, outcome.reason = "failed", f"{type(error).__name__}: {error}"
        log.exception("Failed:")
    outcome.value = value if isinstance(value, int | float) else None
    write(outcome, folder)
    return value


def cut_off(config: DictConfig, parent: str) -> str | None:
    """Where the run of this configuration is that was cut off under a parent run, if there is one."""
    from okddip.run.resume import newest_in_store

    folder = newest_in_store(config, {"mlflow.parentRunId": parent}) if parent else None
    return None if folder is None else str(folder)


def write(outcome: Outcome, folder: Path) -> None:
    """Write down what became of a job, in one step."""
    # jobs on a cluster outlive their sweep, and the next one's may have the same folders
    file = folder / f"outcome-{outcome.start[:8]}.json"
    file.with_suffix(".new").write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".new").replace(file)


@contextmanager
def only_one(config: DictConfig) -> Iterator[None]:
    """Let one process at a time work on a run: two that want the same one do not train it twice."""
    from okddip.run.resume import identity
    from okddip.tracking.tracker import public

    uri = config.tracking.get("uri")
    store = f"{public(uri)} {config.tracking.experiment}" if uri else str(Path.cwd())
    name = hashlib.sha256(f"{identity(config)} {store}".encode()).hexdigest()[:16]
    folder = Path(config.dataset.cache_dir).expanduser() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"dataset.cache_dir={config.dataset.cache_dir}: cannot be written ({error.strerror})."
            " Name another folder, here or in OKDDIP_CACHE."
        ) from error
    lock = FileLock(folder / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: another process works on this very run; waiting for it.", config.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def finished_runs(config: DictConfig, everywhere: bool = False, parent: str | None = None) -> Iterator[Run]:
    """Finished MLflow runs with this configuration and these images in tracking's experiment, newest first.

    Args:
        config: of the run.
        everywhere: look in all experiments of the store.
        parent: look among the children of this run alone.

    Raises:
        ConfigError: the store cannot be opened, or the images that are to be compared cannot be had.
    """
    from okddip.run.resume import digests, identity
    from okddip.tracking.tracker import digests_of

    tracker = instantiate(config.tracking)
    tracker.open()
    under = {} if parent is None else {"mlflow.parentRunId": parent}
    for run in tracker.find({"identity": identity(config), **under}, everywhere):
        if run.info.status == "FINISHED" and "final/top1" in run.data.metrics:
            if digests_of(run) == digests(config):
                yield run
            else:
                log.info("MLflow run %s has these settings, and other images.", run.info.run_id)


def end(error: BaseException | None = None) -> bool:
    """Close and report on the sweep of this process, if there is one.

    Args:
        error: what the program ends with before its time.

    Returns:
        Whether nothing failed.
    """
    global _begun
    with unstopped():
        sweep, _begun = _begun, None
        for name in (NAME, UNNAMED, PROCESS):
            os.environ.pop(name, None)
        parent = os.environ.pop(PARENT_RUN, "")
        start = os.environ.pop(START, "")
        if sweep is None:
            return True
        outcomes = all_outcomes(sweep, start)
        finished_before = [outcome.run_id for outcome in outcomes if outcome.run_id]
        if parent and outcomes and not is_stop(error):
            try:
                if sweep.tracker is not None:
                    sweep.tracker.finish_ended_runs()  # of jobs, and of their teachers, that were killed
                report(sweep, parent, finished_before)
            except Exception:  # the jobs are done, and the last lines are still to be said
                log.exception("The end of the sweep is not whole:")
            except BaseException as stop:
                error = stop
        kinds = Counter(outcome.kind for outcome in outcomes)
        good = error is None and kinds.keys() <= GOOD and kinds["skipped"] < len(outcomes)
        if is_stop(error):
            end_processes()
        if sweep.tracker is not None:
            if is_stop(error):
                sweep.tracker.finish("KILLED")  # first of all: there may be seconds left
            sweep.tracker.set_tags(finished_before_tags(finished_before))
            if is_stop(error):
                sweep.tracker.finish_ended_runs()
            else:
                sweep.tracker.finish("FINISHED" if good else "FAILED")
        conclude(sweep, outcomes, good, error)
        let_go(sweep)
    if is_stop(error):
        raise error
    return good


def all_outcomes(sweep: Sweep, start: str) -> list[Outcome]:
    """What became of the jobs of a sweep, those among them that did not begin or cannot be."""
    outcomes = outcomes_in(sweep.folder, start) + sweep.left_out
    begun = {outcome.job for outcome in outcomes}
    return outcomes + [
        Outcome(number, job, "not started", "the sweep ended before its turn, or its process at once")
        for number, job in enumerate(sweep.jobs)
        if number not in begun
    ]


def end_processes() -> None:
    """Kill processes of this one that are left: a second signal may have kept joblib from it."""
    for process in multiprocessing.active_children():
        process.kill()
        process.join(PATIENCE)


def is_stop(error: BaseException | None) -> TypeGuard[BaseException]:
    """Whether the program was asked to end."""
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code != 1)


def conclude(sweep: Sweep, outcomes: Sequence[Outcome], good: bool, error: BaseException | None) -> None:
    """Print the last lines of a sweep: how many jobs became what, and why those that are not finished."""
    kinds = Counter(outcome.kind for outcome in outcomes)
    jobs = "1 job" if len(outcomes) == 1 else f"{len(outcomes) or 'no'} jobs"
    counts = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    print(f"Sweep {for_terminal(sweep.name)}, {jobs}{': ' if counts else ''}{counts}.")
    common = (
        set.intersection(*(set(outcome.overrides) for outcome in outcomes)) if len(outcomes) > 1 else set()
    )
    for kind in ("skipped", "not started", "cut off", "failed"):
        for outcome in outcomes:
            if outcome.kind == kind:
                own = " ".join(part for part in outcome.overrides if part not in common)
                reason = for_terminal(outcome.reason, lines=True).replace("\n", "\n  ")
                print(f"{kind} #{outcome.job} {for_terminal(own)}: {reason}")
    if is_stop(error) and sweep.outlived:
        print("Jobs that submitit was given may go on, or begin, without this process.")
    cause = error.__context__ if isinstance(error, SystemExit) and not is_stop(error) else None
    if outcomes and isinstance(cause, Exception):
        kind = "" if isinstance(cause, HydraException) else f"{type(cause).__name__}: "
        first_line, *_ = str(cause).splitlines() or [""]
        print(f"The sweep itself ended early: {kind}{for_terminal(first_line)}")
    elif sweep.tracker is not None and outcomes and not good:
        again = "The same command again"
        if sweep.forced and not is_stop(error):
            again = "The same command without trainer.rerun=true"
        print(f"{again} does what is missing, and nothing twice.")


def outcomes_in(folder: Path, start: str) -> list[Outcome]:
    """What became of the jobs that a sweep started in its folder, in their order."""
    outcomes = []
    for path in folder.rglob("outcome-*.json"):
        try:
            outcome = Outcome(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            log.warning("%s: cannot be read (%s).", path, error)
            continue
        if outcome.start in (start, ""):
            outcomes.append(outcome)
    return sorted(outcomes, key=lambda outcome: outcome.job)


def finished_before_tags(run_ids: Sequence[str]) -> dict[str, str]:
    """Tags of a parent run that name runs of other parents that count among its jobs."""
    parts = [run_ids[start : start + IDS_IN_A_TAG] for start in range(0, len(run_ids), IDS_IN_A_TAG)]
    return {f"{FINISHED_BEFORE}.{number}": " ".join(part) for number, part in enumerate(parts)}


def finished_before(parent: Run) -> set[str]:
    """IDs of the runs that `finished_before_tags` name."""
    tags = parent.data.tags.items()
    return {run_id for key, ids in tags if key.startswith(f"{FINISHED_BEFORE}.") for run_id in ids.split()}


def report(sweep: Sweep, parent: str, finished_before: list[str]) -> None:
    """Print the table of a sweep's runs, and log tables and figures to its parent run.

    Args:
        parent: ID of the parent run.
        finished_before: IDs of the runs that were not trained again; they may be of another sweep.
    """
    from okddip.tasks.report import make
    from okddip.tracking.tracker import MLflow, Unbroken, open_store

    assert isinstance(sweep.tracker, MLflow)
    try:
        client = cast("MlflowClient", Unbroken(open_store(sweep.tracker.uri)))
        runs = {run.info.run_id: run for run in sweep.tracker.find({"mlflow.parentRunId": parent})}
        runs |= {run_id: client.get_run(run_id) for run_id in finished_before if run_id not in runs}
        make(client, list(runs.values()), sweep.folder / "report", parent)
    except Exception as error:  # the runs are whole without it, and `okddip task=report` makes it again
        log.warning("The report on this sweep is not whole: %s", error)
