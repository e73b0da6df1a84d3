"""An MLflow store: opened if it answers, with the experiment in it that runs are logged to."""

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout

from okddip.errors import ConfigError
from okddip.text import for_shell_word
from okddip.tracking.address import ALLOWED_URIS, absolute_uri
from okddip.tracking.moved import ARTIFACTS
from okddip.tracking.sqlite import LOCK_SECONDS, complete_store
from okddip.tracking.unsent import finish_if_ended
from okddip.tracking.waiting import call_within, first_line

if TYPE_CHECKING:  # importing MLflow takes more than a second, and `okddip --help` has no use for it
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

OPEN_SECONDS = 4.0  # until a store that does not answer is given up; the program's start takes about as long
ANSWER_SECONDS = 6.0  # for one answer, where nothing can go on without it
FINISH_SECONDS = 120.0  # to send what an ended run has left, with its files
DATABASE = "sqlite:|postgresql|mysql|mssql"  # begins its URI
# The description of a new experiment, which people may edit. MLflow shows its first line; the rest unfolds.
HOW_TO_READ = """\
Each row is a training run or a sweep, whose runs unfold below it; `final/top1` is what to compare.

- `final/top1` is the test accuracy (%) after the last epoch. `best/top1` is that of the best epoch: best on
  the test set itself, so an optimistic figure, unless images were held out (`dataset.validation`).
- Both are the primary predictor's: the group leader for OKDDip, the student for the baseline and KD, the mean
  of the peers for most others. `test/ensemble/top1` is their ensemble, `test/peer0/top1` a single peer.
- A sweep has the accuracies of its best setting, which the tag `best.setting` names; its description has its
  table and figures. A run named `teacher ...` was trained for the sweep's students.
- For curves unfold a sweep in the chart view. Parameters are overrides of the command line.
- `okddip task=report` compares runs in a table with intervals.
"""
MOST = 50_000  # runs or experiments that a store lists at once


class Store:
    """An open store.

    Only `MlflowClient` is used, never MLflow's global active run, so nothing leaks from one run of a process
    into the next.

    Args:
        uri: `sqlite:///FILE`, another database or the address of a server.
        experiment: created if absent.

    Attributes:
        client: MLflow's own.
        experiment_id: of the experiment.
        lock_seconds: how long any call may wait for others that write to the same SQLite file, which is no
            store that does not answer. 0 for other stores, and where there is no time.

    Raises:
        ConfigError: the store cannot be opened; within 10 s, where MLflow itself tries for minutes.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # the store is told, nobody else
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # bars between our lines
        from mlflow import MlflowClient

        # migrations and single failures; what matters is logged here, once
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)
        self.uri = uri
        self.lock_seconds = 0.0
        artifacts = None
        try:
            if not uri:
                raise ValueError("it is empty")
            with prepared_database(uri) as file:
                if file is not None:
                    artifacts = (file.parent / ARTIFACTS).as_uri()
                    self.lock_seconds = LOCK_SECONDS
                self.client = MlflowClient(absolute_uri(uri))
                seconds = LOCK_SECONDS if re.match(DATABASE, uri) else OPEN_SECONDS  # it may make its tables
                self.experiment_id = self.call(seconds, self._ensure_experiment, experiment, artifacts)
        except ConfigError:
            raise
        except Exception as error:
            raise self.cannot_open(error) from error

    def _ensure_experiment(self, name: str, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return self.client.create_experiment(
                    name, artifacts, tags={"mlflow.note.content": HOW_TO_READ}
                )
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was quicker
                    raise
            experiment = self.client.get_experiment_by_name(name)
        assert experiment is not None
        if experiment.lifecycle_stage == "deleted":
            raise ConfigError(
                f"tracking.experiment={name}: this experiment was deleted in {self.uri}. "
                f"Choose another name, or `MLFLOW_TRACKING_URI={for_shell_word(absolute_uri(self.uri))}"
                f" mlflow experiments restore -x {experiment.experiment_id}`."
            )
        return experiment.experiment_id

    def cannot_open(self, error: Exception) -> ConfigError:
        """What a user is told of a store that fails."""
        if "database is locked" in str(error) or isinstance(error, Timeout):
            return ConfigError(
                f"tracking.uri={self.uri}: another process has been writing to this store for seconds, "
                "or was stopped while it wrote (database is locked). End it or let it go on, and try again; "
                "tracking=none trains without MLflow."
            )
        return ConfigError(
            f"tracking.uri={self.uri}: this store cannot be opened ({first_line(error)}). "
            f"It must be {ALLOWED_URIS}. It comes from MLFLOW_TRACKING_URI where that is set; "
            "tracking=none trains without MLflow."
        )

    def call(self, seconds: float, method: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Call a method that asks the store, and wait at most so long.

        Always in a thread: a signal that ends the run then breaks off the wait, and no transaction.
        """
        return call_within(max(seconds, self.lock_seconds), partial(method, *given, **named))

    def ask(self, method: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Call a method without whose answer nothing can go on.

        Raises:
            ConfigError: the store does not answer any more.
        """
        try:
            return self.call(ANSWER_SECONDS, method, *given, **named)
        except Exception as error:
            raise self.cannot_open(error) from error

    def find(self, tags: Mapping[str, str], everywhere: bool = False, running: bool = False) -> list["Run"]:
        """The experiment's runs that have all these tags, newest first.

        Args:
            tags: of the runs.
            everywhere: look in all experiments of the store.
            running: only those that the store calls running.

        Raises:
            ConfigError: the store does not answer any more.
        """
        conditions = [
            f"tags.`{key}` = " + (f'"{value}"' if "'" in value else f"'{value}'")
            for key, value in tags.items()
            if not {"'", '"'} <= set(value)  # MLflow's filters know no such value; it is compared below
        ]
        if running:
            conditions.append("attributes.status = 'RUNNING'")
        experiments = [self.experiment_id]
        if everywhere:
            known = self.ask(self.client.search_experiments, max_results=MOST)
            experiments = [experiment.experiment_id for experiment in known]
        newest_first = {"order_by": ["attributes.start_time DESC"], "max_results": MOST}
        runs = self.ask(self.client.search_runs, experiments, " and ".join(conditions), **newest_first)
        return [run for run in runs if tags.items() <= run.data.tags.items()]

    def finish_ended_runs(self) -> None:
        """Finish the runs of this machine that are over, and that the store calls running.

        They were killed outright, or the store did not answer when they ended.
        """
        try:
            running = self.find({"host": socket.gethostname()}, everywhere=True, running=True)
        except ConfigError as error:
            logger.warning("Runs that are over may still be called running: %s", error)
            return
        for run in running:
            try:
                self.call(FINISH_SECONDS, finish_if_ended, self.client, run)
            except Exception as error:
                logger.warning(
                    "MLflow run %s is over, and still called running: %s", run.info.run_id, first_line(error)
                )


def open_store(uri: str) -> "MlflowClient":
    """MLflow's client of a store that exists and answers.

    Raises:
        ConfigError: names the address; within 10 s.
    """
    if uri.startswith("sqlite:"):
        from sqlalchemy.engine import make_url

        file = Path(str(make_url(absolute_uri(uri)).database))
        if not file.is_file():
            raise ConfigError(
                f"tracking.uri={uri}: there is no such store, {file} is no file. Start in the directory in"
                " which the runs were started, or name their store."
            )
    store = Store(uri, "Default")  # which each store has; the experiment that is searched would be created
    store.finish_ended_runs()
    return store.client


@contextmanager
def prepared_database(uri: str) -> Iterator[Path | None]:
    """Reach a database, and let one process at a time create MLflow's tables and experiment in it.

    In PostgreSQL, those that do it at once fail: it refuses what another has created a moment ago.

    Returns:
        The file, if it is SQLite's.
    """
    if uri.startswith("sqlite:"):
        with complete_store(uri) as file:
            yield file
    elif re.match(DATABASE, uri):
        from sqlalchemy import NullPool, create_engine, func, select

        with call_within(OPEN_SECONDS, create_engine(uri, poolclass=NullPool).connect) as connection:
            if connection.dialect.name == "postgresql":
                # held until the connection is closed; any number will do that nobody else takes
                lock = select(func.pg_advisory_xact_lock(int.from_bytes(b"okddip")))
                call_within(LOCK_SECONDS, partial(connection.execute, lock))
            yield None
    else:
        yield None
