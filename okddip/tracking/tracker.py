"""MLflow: one run holds the configuration, the metrics of every epoch and the artifacts.

Only `MlflowClient` is used, never MLflow's global active run, so nothing leaks from one run of a process
into the next. A run outlives its store: what cannot be sent is kept, and sent when the store answers again.
"""

import json
import logging
import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from okddip.errors import ConfigError, check_choice
from okddip.tracking import outbox
from okddip.tracking.address import ALLOWED_URIS, absolute_uri, without_credentials
from okddip.tracking.outbox import Request, may_pass
from okddip.tracking.params import (
    MAX_DIGEST_LENGTH,
    MAX_KEY_LENGTH,
    MAX_METRICS,
    MAX_PARAMS,
    MAX_TAGS,
    RESUMED,
    _batches,
    _importance,
    _tags,
    flatten,
    params_of,
)
from okddip.tracking.source import source_tags
from okddip.tracking.store import ANSWER_SECONDS, LOCK_SECONDS, whole_sqlite
from okddip.tracking.waiting import _first_line, _within

if TYPE_CHECKING:  # importing MLflow takes more than a second, and `okddip --help` has no use for it
    import mlflow
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

logger = logging.getLogger(__name__)

OPEN_SECONDS = 4.0  # until a store that does not answer is given up; the program's start takes about as long
SEND_SECONDS = 0.8  # what an epoch waits for one answer; at most two are waited for
RETRY_SECONDS = 10.0  # how long a store that does not answer is left alone
UPLOAD_SECONDS = 120.0  # a server may store a large file before it answers
FINISH_SECONDS = 60.0  # for all that is unsent at the end, as long as the store answers; for files as well
KILL_SECONDS = 3.0  # the same where the run is killed


class DatasetSplit(NamedTuple):
    """Images that a run works on."""

    name: str  # of the data set
    digest: str  # the same for the same images
    place: str  # where they are
    images: int


class MLflow:
    """Tracking in an MLflow store.

    Args:
        uri: where the store is: `sqlite:///FILE`, another database or the address of a server.
        experiment: name of the experiment; created if absent.
        checkpoints: whether the trainer logs its checkpoints as artifacts.
        system_metrics: whether training logs the load of CPU, memory, disk, network and GPUs.
    """

    def __init__(
        self, uri: str, experiment: str, checkpoints: bool = True, system_metrics: bool = False
    ) -> None:
        self.uri = uri
        self.experiment = experiment
        self.checkpoints = checkpoints
        self.system_metrics = system_metrics
        self.run_id = ""
        self._client: mlflow.tracking.MlflowClient
        self._experiment_id = ""
        self._folder: Path | None = None  # of the run
        self._unsent: deque[Request] = deque()
        self._uploads: deque[Request] = deque()  # of files, for which nothing else waits
        self._away = False
        self._retry_at = 0.0
        self._upload_at = 0.0
        self._uploads_failed = False
        self._killed = False
        self._latest = 0  # of the run's times, in milliseconds since 1970
        self._monitor: SystemMetricsMonitor | None = None

    def open(self) -> None:
        """Reach the store; create its tables and the experiment if they are absent.

        Raises:
            ConfigError: the store cannot be opened; within 10 s, where MLflow itself tries for minutes. Or
                a switch is neither on nor off, or system metrics are wanted, and what measures them is not
                installed.
        """
        check_choice("tracking.checkpoints", self.checkpoints, (True, False))
        check_choice("tracking.system_metrics", self.system_metrics, (True, False))
        if self.system_metrics and find_spec("psutil") is None:
            raise ConfigError(
                "tracking.system_metrics=true: needs psutil, and nvidia-ml-py for NVIDIA's GPUs:"
                " pip install 'okddip[system]'."
            )
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # the store is told, nobody else
        from mlflow.tracking import MlflowClient

        # migrations and single failures; what matters is told here, once
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)
        try:
            if not self.uri:
                raise ValueError("it is empty")
            if self.uri.startswith("sqlite:"):
                self._open_sqlite()
            elif re.match("postgresql|mysql|mssql", self.uri):
                with _turn(self.uri):
                    self._client = MlflowClient(self.uri)
                    self._ensure_experiment()
            else:
                self._client = MlflowClient(self.uri)
                _within(OPEN_SECONDS, self._ensure_experiment)
        except ConfigError:
            raise
        except Exception as error:
            raise self._cannot_open(error) from error
        self.finish_ended_runs()

    def _open_sqlite(self) -> None:
        from mlflow.tracking import MlflowClient
        from sqlalchemy.engine import make_url

        if make_url(self.uri).database in (None, "", ":memory:"):
            raise ValueError("it would be gone with the run")
        url = make_url(absolute_uri(self.uri))
        with whole_sqlite(url):
            self._client = MlflowClient(absolute_uri(self.uri))
            # where an `mlflow server` that is started beside the file keeps artifacts too
            self._ensure_experiment((Path(str(url.database)).parent / "mlartifacts").as_uri())

    def finish_ended_runs(self) -> None:
        """Tell the store of the runs of this machine that are over, and that it calls running.

        They were killed outright, or it did not answer when they ended.
        """
        try:
            running = self.find({"host": socket.gethostname()}, everywhere=True, running=True)
        except ConfigError as error:
            logger.warning("Runs that are over may still be called running: %s", error)
            return
        for run in running:
            try:
                self._call(UPLOAD_SECONDS, partial(outbox.finish_if_ended, self._client, run))
            except Exception as error:
                logger.warning(
                    "MLflow run %s is over, and still called running: %s", run.info.run_id, _first_line(error)
                )

    def _ensure_experiment(self, artifacts: str | None = None) -> None:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(self.experiment)
        if experiment is None:
            try:
                self._client.create_experiment(self.experiment, artifact_location=artifacts)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was quicker
                    raise
            experiment = self._client.get_experiment_by_name(self.experiment)
        assert experiment is not None
        if experiment.lifecycle_stage == "deleted":
            raise ConfigError(
                f"tracking.experiment={self.experiment}: this experiment was deleted in {self.uri}. "
                f"Choose another name, or `mlflow experiments restore -x {experiment.experiment_id}`."
            )
        self._experiment_id = experiment.experiment_id

    def _cannot_open(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"tracking.uri={self.uri}: this store cannot be opened ({_first_line(error)}). "
            f"It must be {ALLOWED_URIS}. It comes from MLFLOW_TRACKING_URI where that is set; "
            "tracking=none trains without MLflow."
        )

    def start(
        self,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        config_yaml: str,
        command: str,
        run_id: str | None = None,
        store: str | None = None,
        anew: bool = False,
    ) -> str:
        """Begin a run, or go on with the run `run_id`.

        Args:
            name: what the run is called in MLflow.
            params: the configuration as plain data, nested or flat; a param is named like its override.
            tags: beside those that say who runs which code where.
            config_yaml: the resolved configuration, kept as `config.yaml`.
            command: the command line, kept as the tag `command` and in `command.txt`.
            run_id: a run of this store that goes on. MLflow lets no param change: one with another
                value than before becomes a tag, `resumed.trainer.epochs`.
            store: where that run was begun. If it was this store, and the run has been deleted for good, a
                new one begins.
            anew: begin a new run also if this store never had that one.

        Returns:
            The run's ID.

        Raises:
            ConfigError: the store does not answer any more, or has no run `run_id`.
        """
        flat = flatten(params)
        tags = _tags({**source_tags(), **tags, "command": command})
        reopened = None if run_id is None else self._reopen_run(run_id, store, anew)
        if reopened is None:
            created = self._create_run(name, tags)
            self.run_id, self._latest = created.info.run_id, created.info.start_time
            self._log_params(flat)
        else:
            self.run_id = reopened.info.run_id
            self._latest = max(reopened.info.start_time, reopened.info.end_time or 0)
            logged = reopened.data.params
            self._log_params({key: value for key, value in flat.items() if key not in logged})
            known = params_of(reopened)
            changed = {key: value for key, value in flat.items() if known.get(key, value) != value}
            self.set_tags({**tags, **{f"{RESUMED}{key}": value for key, value in changed.items()}})
        if "folder" in tags:
            self._folder = Path(tags["folder"])
            outbox.kept(self._folder, self.run_id).unlink(missing_ok=True)  # a run that goes on tells it all
        for file, text in (("config.yaml", config_yaml), ("command.txt", command + "\n")):
            self._uploads.append(Request(file, "text", (text, file)))
        self._flush_uploads(SEND_SECONDS)
        return self.run_id

    def _create_run(self, name: str, tags: dict[str, str]) -> "mlflow.entities.Run":
        name = name[:MAX_KEY_LENGTH]  # what databases other than SQLite take
        create = partial(self._client.create_run, self._experiment_id, run_name=name, tags=tags)
        try:
            return self._call(ANSWER_SECONDS, create)
        except Exception as error:
            raise self._cannot_open(error) from error

    def _reopen_run(self, run_id: str, store: str | None, anew: bool) -> "mlflow.entities.Run | None":
        """The run that goes on; None if a new one takes its place.

        That is where it is gone from the store in which it was begun, or belongs to another experiment; where
        it was begun in another store, if a new one is wanted there.
        """
        from mlflow.exceptions import MlflowException

        here = without_credentials(self.uri)
        try:
            run = self._call(ANSWER_SECONDS, partial(self._client.get_run, run_id))
            if run.info.lifecycle_stage == "deleted":
                reason = f"was deleted in {here}"
            elif run.info.experiment_id != self._experiment_id:
                reason = f"is not in tracking.experiment={self.experiment}"
            else:
                self._call(ANSWER_SECONDS, partial(self._client.update_run, run_id, status="RUNNING"))
                return run
        except Exception as error:
            absent = isinstance(error, MlflowException) and error.error_code == "RESOURCE_DOES_NOT_EXIST"
            if not (absent and (anew or store == here)):
                begun = f" It was begun in tracking.uri={store}." if store not in (None, here) else ""
                raise ConfigError(
                    f"MLflow run {run_id}: cannot go on in tracking.uri={self.uri}"
                    f" ({_first_line(error)}).{begun} tracking=none goes on without MLflow, which can be told"
                    " of all epochs later."
                ) from error
            reason = f"is gone from {here}" if store in (None, here) else f"is in {store}, not in {here}"
        logger.warning("MLflow run %s %s: a new one is told of all epochs.", run_id, reason)
        return None

    def _log_params(self, params: Mapping[str, str]) -> None:
        for batch in _batches(list(params.items()), MAX_PARAMS):
            self._send(Request("params", "params", batch))

    def find(
        self, tags: Mapping[str, str], everywhere: bool = False, running: bool = False
    ) -> list["mlflow.entities.Run"]:
        """The experiment's runs that have all these tags, newest first.

        Args:
            tags: of the runs.
            everywhere: look in all experiments of the store.
            running: only those that the store calls running.

        Raises:
            ConfigError: the store does not answer any more.
        """
        # MLflow's filters cannot say a value with both kinds of quotes; what they do not say is compared here
        sayable = {key: value for key, value in tags.items() if not {"'", '"'} <= set(value)}
        wanted = " and ".join(
            f"tags.`{key}` = " + (f'"{value}"' if "'" in value else f"'{value}'")
            for key, value in sayable.items()
        )
        if running:
            wanted += " and attributes.status = 'RUNNING'"
        experiments = [self._experiment_id]
        if everywhere:
            experiments = [each.experiment_id for each in self._all_of(self._client.search_experiments)]
        search = partial(
            self._client.search_runs, experiments, wanted, order_by=["attributes.start_time DESC"]
        )
        return [run for run in self._all_of(search) if tags.items() <= run.data.tags.items()]

    def _all_of(self, search: Callable[..., Any]) -> list[Any]:
        """What a search of the client finds, page after page."""
        found: list[Any] = []
        token: str | None = None
        while True:
            try:
                page = self._call(ANSWER_SECONDS, partial(search, page_token=token))
            except Exception as error:
                raise self._cannot_open(error) from error
            found += page
            token = page.token
            if not token:
                return found

    def log(self, metrics: Mapping[str, float], epoch: int, timestamp_ms: int | None = None) -> None:
        """Log one epoch's metrics.

        `timestamp_ms` is in milliseconds since 1970, now if None. MLflow doubles a metric that is sent
        again with another timestamp, and not one with the same; of two at one epoch it shows the later.
        """
        when = self._now() if timestamp_ms is None else timestamp_ms
        self._latest = max(self._latest, when)
        # MLflow's pages show metrics in the order of their arrival, and the compare page plots the first
        items = [(key, float(metrics[key]), when, epoch) for key in sorted(metrics, key=_importance)]
        for batch in _batches(items, MAX_METRICS):
            self._send(Request(f"epoch {epoch}", "metrics", batch))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file to the run's artifacts, there into `folder`. The only call that may wait long."""
        self._uploads.append(Request(path.name, "file", (str(path.absolute()), folder)))
        self._flush_uploads(UPLOAD_SECONDS)

    def log_datasets(self, splits: Mapping[str, DatasetSplit]) -> None:
        """Name what the run works on in MLflow's own field, by what it is for: `train`, `val` or `test`."""
        used = [
            (
                {
                    "name": split.name,
                    "digest": split.digest[:MAX_DIGEST_LENGTH],
                    "source_type": "local",
                    "source": json.dumps({"uri": split.place}),
                    "profile": json.dumps({"num_rows": split.images}),
                },
                context,
            )
            for context, split in splits.items()
        ]
        self._send(Request("data sets", "data sets", used))

    def watch_system(self) -> None:
        """Log the load of CPU, memory, disk, network and GPUs until the run ends, if that is switched on.

        MLflow's own thread does it, so that a store which does not answer holds nothing up.
        """
        if not self.system_metrics:
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        class Monitor(SystemMetricsMonitor):
            def monitor(self) -> None:
                while not self._shutdown_event.is_set():
                    super().monitor()  # gives up for good where the store does not answer once
                    self._shutdown_event.wait(RETRY_SECONDS)

        def begin() -> "SystemMetricsMonitor":
            monitor = Monitor(self.run_id, resume_logging=True, tracking_uri=absolute_uri(self.uri))
            monitor.start()
            return monitor

        try:
            self._monitor = _within(ANSWER_SECONDS, begin)
        except Exception as error:
            logger.warning("There are no system metrics of this run: %s", _first_line(error))

    def _unwatch_system(self) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            with suppress(Exception):  # what the store does not take within this time is lost
                _within(SEND_SECONDS, monitor.finish)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run, or replace them."""
        for batch in _batches(list(_tags(tags).items()), MAX_TAGS):
            self._send(Request("tags", "tags", batch))

    def finish(self, status: str) -> None:
        """End the run as `FINISHED`, `FAILED` or `KILLED`, after a last attempt to send what is unsent.

        If it is killed, that takes seconds at most, and files are left to the run that goes on.
        """
        if not self.run_id:
            return
        self._unwatch_system()
        end = Request("status", "end", (status, self._now()))
        if status == "KILLED":
            self._killed = True
            self._uploads.clear()
        else:
            self._flush(FINISH_SECONDS, ANSWER_SECONDS)
            if not self._away:
                self._flush_uploads(UPLOAD_SECONDS)
        away = self._away and not self._killed  # it was waited for just now
        self._unsent.append(end)
        if not away:  # whatever has become of the files
            self._flush(*((KILL_SECONDS,) * 2 if self._killed else (FINISH_SECONDS, ANSWER_SECONDS)))
        if lacking := [*self._unsent, *self._uploads]:
            missing = ", ".join(dict.fromkeys(request.what for request in lacking))
            logger.warning(
                "MLflow at %s does not answer: its run %s lacks %s.%s",
                *(self.uri, self.run_id, missing, self._keep(lacking)),
            )
            self._unsent.clear()
            self._uploads.clear()

    def _now(self) -> int:
        """Milliseconds since 1970; never before a time that the run has, maybe of another clock."""
        return max(time.time_ns() // 1_000_000, self._latest)

    def _keep(self, lacking: list[Request]) -> str:
        """Leave the end of a run to the next command, with what else is unsent; a sentence that says so."""
        if self._folder is None or not self._unsent:  # a run that has its end is not looked for
            return ""
        try:
            path = outbox.keep(self._folder, self.run_id, lacking)
        except OSError as error:
            return f" That cannot be kept ({error})."
        return f" It is kept in {path}; the next command on this machine that opens this store sends it."

    def _send(self, request: Request) -> None:
        """Send a request after those that are unsent, unless the store was found away a moment ago."""
        self._unsent.append(request)
        started = time.monotonic()
        if started >= self._retry_at:
            self._flush(SEND_SECONDS, SEND_SECONDS)
            if not self._unsent and time.monotonic() - started < SEND_SECONDS / 2:
                self._flush_uploads(SEND_SECONDS)

    def _flush_uploads(self, seconds: float) -> None:
        """Send files, unless the store, or where it keeps files, was found away a moment ago.

        Each gets so many seconds; after FINISH_SECONDS no other is begun.
        """
        end = time.monotonic() + FINISH_SECONDS
        while self._uploads and max(self._upload_at, self._retry_at) <= time.monotonic() < end:
            request = self._uploads[0]
            try:
                # a store that does not answer gets no time for an upload
                self._call(min(seconds, ANSWER_SECONDS), partial(self._client.get_run, self.run_id))
                self._call(seconds, partial(outbox.send, self._client, self.run_id, request))
            except Exception as error:
                if may_pass(error):
                    if not (self._uploads_failed or self._away):
                        logger.warning(
                            "MLflow at %s does not take %s (%s). Training goes on; what it lacks is kept, and"
                            " sent at the end.",
                            *(self.uri, request.what, _first_line(error)),
                        )
                    self._uploads_failed, self._upload_at = True, time.monotonic() + RETRY_SECONDS
                    return
                logger.warning("MLflow at %s refuses %s: %s", self.uri, request.what, _first_line(error))
            self._uploads.popleft()

    def _flush(self, patience: float, answer: float) -> None:
        """Send what is unsent, in order; what the store does not answer stays.

        After `patience` seconds no request is begun, `answer` seconds are waited for one.
        """
        end = time.monotonic() + patience
        while self._unsent and time.monotonic() < end:
            request = self._unsent[0]
            try:
                self._call(answer, partial(outbox.send, self._client, self.run_id, request))
            except Exception as error:
                if may_pass(error):
                    if not self._away:
                        logger.warning(
                            "MLflow at %s does not answer (%s). Training goes on; what it lacks is kept, and "
                            "sent when it answers again.",
                            self.uri,
                            _first_line(error),
                        )
                    self._away, self._retry_at = True, time.monotonic() + RETRY_SECONDS
                    return
                logger.warning("MLflow at %s refuses %s: %s", self.uri, request.what, _first_line(error))
            if self._away:
                logger.info("MLflow at %s answers again.", self.uri)
            self._away = False
            self._unsent.popleft()

    def _call(self, seconds: float, call: Callable[[], Any]) -> Any:
        # A file that others of a sweep are writing to is no store that is away; unless there is no time.
        patient = self.uri.startswith("sqlite:") and not self._killed
        # Always in a thread: a signal that ends the run then breaks off the wait, and no transaction.
        return _within(LOCK_SECONDS if patient else seconds, call)


class NoTracking:
    """The interface of `MLflow`; keeps nothing."""

    checkpoints = False
    run_id = ""

    def open(self) -> None:
        """There is nothing to open."""

    def finish_ended_runs(self) -> None:
        """There are no runs to end."""

    def start(
        self,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        config_yaml: str,
        command: str,
        run_id: str | None = None,
        store: str | None = None,
        anew: bool = False,
    ) -> str:
        """Return an empty run ID."""
        return self.run_id

    def find(
        self, tags: Mapping[str, str], everywhere: bool = False, running: bool = False
    ) -> list["mlflow.entities.Run"]:
        """There are no runs to find."""
        return []

    def log(self, metrics: Mapping[str, float], epoch: int, timestamp_ms: int | None = None) -> None:
        """Keep nothing."""

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep nothing."""

    def log_datasets(self, splits: Mapping[str, DatasetSplit]) -> None:
        """Keep nothing."""

    def watch_system(self) -> None:
        """There is nobody to tell."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Keep nothing."""

    def finish(self, status: str) -> None:
        """There is nothing to end."""


def open_store(uri: str) -> "mlflow.MlflowClient":
    """A client of a store that exists and answers.

    Raises:
        ConfigError: names the address; within 10 s.
    """
    if uri.startswith("sqlite:"):
        from sqlalchemy.engine import make_url

        file = Path(make_url(uri).database or "").absolute()
        if not file.is_file():
            raise ConfigError(
                f"tracking.uri={uri}: there is no such store, {file} is no file. Start in the directory in"
                " which the runs were started, or name their store."
            )
        uri = absolute_uri(uri)
    # each store has the experiment "Default"; to open the one that is searched would create it
    store = MLflow(uri, "Default")
    store.open()
    return store._client


@contextmanager
def _turn(uri: str) -> Iterator[None]:
    """Reach a database; in PostgreSQL, let one process at a time create MLflow's tables and experiment.

    Those that do it at once fail: PostgreSQL refuses what another has created a moment ago.
    """
    from sqlalchemy import NullPool, create_engine, func, select

    with _within(OPEN_SECONDS, create_engine(uri, poolclass=NullPool).connect) as connection:
        if connection.dialect.name == "postgresql":
            # held until the connection is closed; any number will do that nobody else takes
            lock = select(func.pg_advisory_xact_lock(int.from_bytes(b"okddip")))
            _within(LOCK_SECONDS, partial(connection.execute, lock))
        yield
