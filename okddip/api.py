"""The program from Python: compose a configuration, train it, and read runs and their metrics from the store.

A run is the same as one from the command line: its folder, its configuration, its MLflow run and the command
that is recorded with it. What Hydra, `logging` and `sys.argv` hold is afterwards what it was before.
"""

from __future__ import annotations

import copy
import difflib
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime, run_job
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from okddip import distributed
from okddip.assembly import CONFIG_HOME, PEERS, compose_networks
from okddip.checks import check
from okddip.command_line import as_typed, check_choices, check_words, config_folders
from okddip.errors import ConfigError
from okddip.files import remove_unused
from okddip.home import ensure_home
from okddip.hooks import check_output_folder
from okddip.invocation import standing_for
from okddip.main import build, make_without_data
from okddip.signals import stop_on_signals, stops_deferred
from okddip.sweeps.begin import NO_CHDIR
from okddip.sweeps.environment import TRAIN, is_teacher
from okddip.sweeps.outcomes import finished_before
from okddip.tasks.report import reproduce
from okddip.tasks.report import runs as stored
from okddip.text import LogFormatter
from okddip.tracking.store import open_store

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

HYDRAS = re.compile(r"\$\{hydra:[\w.]+\}")
JOB = "main"  # Hydra's name of the job, and that of the log file
COMMAND = "command"  # key of a composed configuration: the overrides that it was composed from
EPOCH_METRICS = ("train/", "val/", "test/")  # begin the names of what is logged for each epoch


@dataclass(frozen=True)
class TrainedRun:
    """A run that has been trained.

    Attributes:
        run_id: of its MLflow run; None with `tracking=none`.
        folder: with its checkpoints.
        metrics: a row for each epoch, from 1 on; columns are named as in MLflow.
    """

    run_id: str | None
    folder: Path
    metrics: pd.DataFrame = field(repr=False)


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The checked configuration of a run, to look at, to change, and for `train`.

    What refers to other keys follows them: after `config.method.peers = 3`, `config.name` has the new number.
    The key `command` holds the overrides.

    Args:
        overrides: what follows `okddip` on the command line, such as ["experiment=quickstart", "seed=1"];
            also "--config-dir=FOLDER".

    Raises:
        ConfigError: an option, a key or a value that there is not or that is not allowed; what depends on
            the images is checked by `train`.
    """
    words = overrides_in(overrides)
    with program(words) as hydra, hydras_errors_as_ours():
        config = compose_run(hydra, words)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        resolve_hydras_values(config, OmegaConf.to_container(config))
        checked = copy.deepcopy(config)
        check(checked)
        with stops_deferred():  # an import that is broken off cannot be repeated in this process
            import torch
        with torch.random.fork_rng():
            make_without_data(checked)
    with open_dict(config):
        config[COMMAND] = words
    return config


def train(run: Sequence[str] | Mapping[str, Any] | DictConfig = ()) -> TrainedRun:
    """Train a run as `okddip` does from the command line; or resume it, with `trainer.resume`.

    Args:
        run: overrides as for `compose`; or a configuration, composed and maybe changed since then, or that of
            an earlier run. It is checked again. The command that is recorded composes to this configuration.

    Raises:
        ConfigError: the configuration is refused, or training cannot go on.
        KeyboardInterrupt: Ctrl-C, or the notebook's button. The run ends as killed and can be resumed.
    """
    words = overrides_of(run) if isinstance(run, Mapping | DictConfig) else overrides_in(run)
    if distributed.world_size() > 1:
        raise ConfigError(
            "okddip.train: takes one process; several ranks are started by torchrun -m okddip.main."
        )
    trained: list[TrainedRun] = []

    def task(config: DictConfig) -> None:
        with stops_deferred():  # an import that is broken off cannot be repeated in this process
            from okddip.tasks.train import train_run

        with logged(Path(HydraConfig.get().runtime.output_dir)):
            check(config)
            finished, _ = train_run(config, build)
            folder = finished.folder
            rows = {number + 1 - finished.first_epoch: row for number, _, row in folder.read_metrics()}
            metrics = pd.DataFrame.from_dict(rows, orient="index").rename_axis("epoch")
            trained.append(TrainedRun(folder.metadata.get("tracking_id"), folder.path, metrics))

    with program(words) as hydra, standing_for(words), stop_on_signals(keyboard_interrupt=True):
        with hydras_errors_as_ours():
            config = compose_run(hydra, words)
        if (target := OmegaConf.select(config, "task._target_")) != TRAIN:
            raise ConfigError(f"task._target_={target}: okddip.train has task=train; leave task out.")
        made = check_output_folder("hydra.run.dir", config)
        context = HydraContext(hydra.config_loader, Callbacks(config))
        try:
            run_job(task, config, "hydra.run.dir", None, context, configure_logging=False).return_value  # noqa: B018
        except ConfigError:
            remove_unused(made)
            raise
    return trained[0]


def runs(
    sweep: str | None = None,
    where: str | None = None,
    *,
    experiment: str | None = None,
    uri: str | None = None,
) -> pd.DataFrame:
    """The training runs of a store, oldest first: a row for each, by its ID.

    Columns are the run's `name`, `status`, `start`, `sweep` and `folder`, its settings (`method`,
    `method.peers`...; `trainer.precision` as `auto` was on its device), and the last value of each metric:
    `test/top1` and the others after the last epoch, `final/top1`, `best/top1`, `best/epoch`. Unfinished runs
    lack `final/` and `best/`. Two columns say what a mean may have to leave out: `teacher` is true of runs
    that another trained first as its teacher, and no sweep took for a job of its own; `repeated` of finished
    ones that the report leaves out, as a newer one has the same settings and seed.

    Args:
        sweep: only the runs of a sweep: its name, or the ID of its parent run.
        where: only runs that match, in MLflow's filter language: "params.`method.peers` = '4'".
        experiment: of the store; by default the one that the program logs to.
        uri: of the store; by default the one that the program logs to.

    Raises:
        ConfigError: the store does not answer, the filter is not understood, or no training run matches.
    """
    ensure_home()
    address, name = uri or tracking_default("uri"), experiment or tracking_default("experiment")
    client = open_store(address)
    found, searched, _ = stored.search(client, address, name, sweep, where)
    training = stored.training_runs(found)
    if not training:
        raise ConfigError(f"There is no training run in {searched}.")
    training.sort(key=lambda run: run.info.start_time)
    rows = stored.table(training)
    everything = (
        stored.search(client, address, name)[0] if sweep or where else found
    )  # with parents of sweeps
    jobs = {run_id for run in everything for run_id in finished_before(run)}
    rows.insert(5, "teacher", [is_teacher(run) and run.info.run_id not in jobs for run in training])
    rows.insert(6, "repeated", rows.index.isin(stored.repeated_runs(training)))
    return rows


def history(run: str, metric: str, *, uri: str | None = None) -> pd.Series:
    """A metric of a run by epoch, counted from 1.

    Args:
        run: its ID.
        metric: such as "test/top1" or "train/loss".
        uri: of the store; by default the one that the program logs to.

    Raises:
        ConfigError: the store does not answer, or has no such run or metric.
    """
    from mlflow.exceptions import MlflowException

    ensure_home()
    address = uri or tracking_default("uri")
    client: MlflowClient = open_store(address)
    try:
        found = client.get_run(str(run).removeprefix("runs:/"))
    except MlflowException as error:
        raise ConfigError(f"run={run}: {str(error.message).strip()} in tracking.uri={address}.") from None
    names = sorted(name for name in found.data.metrics if name.startswith(EPOCH_METRICS))
    if metric not in names:
        near = ", ".join(difflib.get_close_matches(metric, names, n=5, cutoff=0.4) or names[:5])
        raise ConfigError(
            f"metric={metric}: run {run} has no such metric by epoch; "
            + (f"near it are {near}." if near else "it has none at all.")
        )
    return stored.metric_history(client, found, metric)


def tracking_default(key: str) -> str:
    """What the program takes for a key of `tracking`."""
    return str(OmegaConf.select(OmegaConf.load(CONFIG_HOME / "conf" / "tracking" / "mlflow.yaml"), key))


def overrides_in(words: Sequence[str]) -> list[str]:
    """The words of a command line, if they describe one run.

    Raises:
        ConfigError: they are no list, or one is a flag or no choice of a group.
    """
    if isinstance(words, str) or not all(isinstance(word, str) for word in words):
        raise ConfigError(
            f"{words!r}: must be a list of overrides, such as ['experiment=quickstart', 'seed=1']."
        )
    overrides = as_typed(without_folder(words))
    if flags := [word for word in overrides if word.startswith("-")]:
        raise ConfigError(
            f"{flags[0]}: is no override of one run. A sweep (-m) is started from the command line;"
            " okddip.runs(sweep=...) reads what came of it."
        )
    check_words(overrides, config_folders(words))
    check_choices(overrides)
    return as_typed(words)


def without_folder(words: Sequence[str]) -> list[str]:
    """The words without `--config-dir`."""
    flags = reproduce.config_folders(words)
    return [word for word in words if word not in flags]


def overrides_of(config: Mapping[str, Any] | DictConfig) -> list[str]:
    """Overrides that compose to a configuration: those that it was composed from, and what has changed since.

    Raises:
        ConfigError: it is no configuration of a run, or none that overrides compose to.
    """
    config = copy.deepcopy(config) if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    with open_dict(config):
        command = config.pop(COMMAND, None)
    words = overrides_in([] if command is None else list(command))
    overrides = without_folder(words)
    with program(words), hydras_errors_as_ours():
        compose_networks(config)
        wanted = reproduce.parse_configuration(OmegaConf.to_yaml(config, resolve=True), "config")
        if command is None:
            return reproduce.find_overrides(wanted, ignored=())
        if wanted["model"].get(PEERS) != reproduce.compose_resolved(overrides)["model"].get(PEERS):
            overrides += reproduce.peers_overrides(wanted)
        options = reproduce.compose_resolved(overrides)["options"]
        for group, option in wanted["options"].items():
            if option != options.get(group):
                raise ConfigError(
                    f"config.options.{group}={option}: only names the option that was chosen. Compose the"
                    f" configuration anew, with {group}={option}."
                )
        return [
            *reproduce.config_folders(words),
            *reproduce.complete_overrides(wanted, overrides),
        ]


@contextmanager
def program(words: Sequence[str]) -> Iterator[Hydra]:
    """Hydra as the console command starts it; afterwards its state is that of before."""
    ensure_home()
    own, config, job = GlobalHydra.instance(), HydraConfig.instance(), JobRuntime.instance()
    base = version.VersionBase.instance()
    before = own.hydra, config.cfg, job.get("name"), base.version_base
    own.clear()
    try:
        version.setbase("1.3")
        paths = create_config_search_path(str(CONFIG_HOME / "conf"))
        for folder in config_folders(words):
            if not folder.is_dir():
                raise ConfigError(f"--config-dir={folder}: there is no such folder.")
            paths.prepend("command-line", f"file://{folder.absolute()}", SearchPathQuery(provider="schema"))
        yield Hydra.create_main_hydra2(JOB, paths)
    finally:
        own.hydra, config.cfg, name, base.version_base = before
        job.set("name", name)


def compose_run(hydra: Hydra, words: Sequence[str]) -> DictConfig:
    """The configuration of one run, with Hydra's own part.

    Raises:
        ConfigError: it is that of a sweep, or would change the working directory.
    """
    config = hydra.compose_config("config", without_folder(words), RunMode.RUN)
    if config.hydra.mode == RunMode.MULTIRUN:
        preset = config.hydra.runtime.choices.get("multirun_presets")
        what = f"multirun_presets={preset}" if preset else "hydra.mode=MULTIRUN"
        raise ConfigError(f"{what}: is a sweep, and sweeps are started from the command line.")
    if config.hydra.job.chdir:
        raise ConfigError(NO_CHDIR)
    return config


def resolve_hydras_values(node: DictConfig | ListConfig, raw: Any) -> None:
    """Put in their values where `${hydra:...}` stands, which only Hydra can resolve; leave all else as it is.

    Args:
        node: of the configuration.
        raw: its plain content, unresolved.
    """
    for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw):
        if isinstance(value, dict | list):
            resolve_hydras_values(node[key], value)
        elif isinstance(value, str) and "${hydra:" in value:
            # the rest of the text goes on following what it refers to
            text = HYDRAS.sub(lambda found: str(OmegaConf.create({"value": found[0]}).value), value)
            node[key] = node[key] if "${hydra:" in text else text


@contextmanager
def hydras_errors_as_ours() -> Iterator[None]:
    """Errors of composing, which the console command prints, as `ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        causes = [error, *([error.__cause__] if error.__cause__ else [])]
        raise ConfigError("\n".join(str(cause).strip() for cause in causes)) from None


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Log to the run's folder, and print if nobody else does; then all handlers are those of before."""
    root = logging.getLogger()
    file = logging.FileHandler(folder / f"{JOB}.log", encoding="utf-8", errors="backslashreplace", delay=True)
    file.setFormatter(LogFormatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
    handlers: list[logging.Handler] = [file]
    if all(isinstance(handler, logging.FileHandler) for handler in root.handlers):
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(LogFormatter("%(message)s"))
        handlers.append(console)
    level = root.level
    root.setLevel(min(level, logging.INFO) if level else logging.INFO)
    for handler in handlers:
        handler.setLevel(logging.INFO)
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
