"""MLflow: one run holds the configuration, the metrics of every epoch and the artifacts.

A run outlives its store: what cannot be sent is kept, and sent when the store answers again.
"""

import logging
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from okddip.errors import ConfigError, check_choice
from okddip.tracking.address import how_to_open, without_credentials
from okddip.tracking.outbox import SEND_SECONDS, UPLOAD_SECONDS, Outbox
from okddip.tracking.params import MAX_KEY_LENGTH, RESUMED, flatten, params_of, valid_tags
from okddip.tracking.source import source_tags
from okddip.tracking.store import ANSWER_SECONDS, Store
from okddip.tracking.system_metrics import start_monitor
from okddip.tracking.unsent import Request, unsent_file
from okddip.tracking.waiting import call_within, first_line

if TYPE_CHECKING:  # importing MLflow takes more than a second, and `okddip --help` has no use for it
    from mlflow.entities import Run
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

logger = logging.getLogger(__name__)

MATRIX_ENTRY = re.compile(r"/\d+/\d+$")


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

    Attributes:
        store: open after `open`.
        run_id: of the run after `start`, else empty.
    """

    store: Store

    def __init__(
        self, uri: str, experiment: str, checkpoints: bool = True, system_metrics: bool = False
    ) -> None:
        self.uri = uri
        self.experiment = experiment
        self.checkpoints = checkpoints
        self.system_metrics = system_metrics
        self.run_id = ""
        self._outbox: Outbox | None = None  # of the run
        self._latest = 0  # of the run's times, in milliseconds since 1970
        self._monitor: SystemMetricsMonitor | None = None

    def open(self) -> None:
        """Reach the store; create its tables and the experiment if they are absent.

        Raises:
            ConfigError: the store cannot be opened, the experiment has no name, a switch is neither on nor
                off, or system metrics are wanted and what measures them is not installed.
        """
        check_choice("tracking.checkpoints", self.checkpoints, (True, False))
        check_choice("tracking.system_metrics", self.system_metrics, (True, False))
        if not self.experiment:
            raise ConfigError(
                "tracking.experiment: is empty. Give a name; if the variable MLFLOW_EXPERIMENT_NAME is set to"
                " nothing, unset it."
            )
        if self.system_metrics and find_spec("psutil") is None:
            raise ConfigError(
                "tracking.system_metrics=true: needs psutil, and nvidia-ml-py for NVIDIA's GPUs:"
                " pip install 'okddip[system]'."
            )
        self.store = Store(self.uri, self.experiment)
        self.store.finish_ended_runs()

    def finish_ended_runs(self) -> None:
        """Finish runs of this machine that are over, and that the store calls running."""
        self.store.finish_ended_runs()

    def find(self, tags: Mapping[str, str], everywhere: bool = False) -> list["Run"]:
        """The experiment's runs, or all of the store, that have all these tags, newest first.

        Raises:
            ConfigError: the store does not answer any more.
        """
        return self.store.find(tags, everywhere)

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
        """Begin a run, or resume the run `run_id`.

        Args:
            name: what the run is called in MLflow.
            params: the configuration as plain data, nested or flat; a param is named like its override.
            tags: beside those that say who runs which code where.
            config_yaml: the resolved configuration, kept as `config.yaml`.
            command: the command line, kept as the tag `command` and in `command.txt`.
            run_id: a run of this store, to be resumed. MLflow lets no param change: one with another value
                than before becomes a tag, `resumed.trainer.epochs`.
            store: where that run was begun. If it was this store, and the run has been deleted for good, a
                new one begins.
            anew: begin a new run also if this store never had that one.

        Returns:
            The run's ID.

        Raises:
            ConfigError: the store does not answer any more, or has no run `run_id`.
        """
        flat, tags = flatten(params), {**source_tags(), **tags, "command": command}
        resumed = None if run_id is None else self._resume_run(run_id, store, anew)
        run = resumed or self._create_run(name, tags)
        folder = Path(tags["folder"]) if "folder" in tags else None
        self._outbox = Outbox(self.store, run.info.run_id, folder)
        self.run_id = run.info.run_id
        self._latest = max(run.info.start_time, run.info.end_time or 0)
        self._send("params", "params", [item for item in flat.items() if item[0] not in run.data.params])
        if resumed is not None:
            known = params_of(resumed)
            changed = {RESUMED + key: text for key, text in flat.items() if known.get(key, text) != text}
            self.set_tags({**tags, **changed})
        if folder is not None:
            unsent_file(folder, self.run_id).unlink(missing_ok=True)  # a resumed run sends all again
        self._send("config.yaml", "text", (config_yaml, "config.yaml"))
        self._send("command.txt", "text", (command + "\n", "command.txt"))
        return self.run_id

    def _create_run(self, name: str, tags: Mapping[str, str]) -> "Run":
        create, experiment = self.store.client.create_run, self.store.experiment_id
        name = name[:MAX_KEY_LENGTH]  # what databases other than SQLite take
        return self.store.ask(create, experiment, run_name=name, tags=valid_tags(tags))

    def _resume_run(self, run_id: str, store: str | None, anew: bool) -> "Run | None":
        """The run, called running again. None if a new one takes its place.

        That is where it is gone from the store in which it was begun, or belongs to another experiment; where
        it was begun in another store, if a new one is wanted there.
        """
        from mlflow.exceptions import MlflowException

        here, client = without_credentials(self.uri), self.store.client
        try:
            run = self.store.call(ANSWER_SECONDS, client.get_run, run_id)
            if run.info.lifecycle_stage == "active" and run.info.experiment_id == self.store.experiment_id:
                self.store.call(ANSWER_SECONDS, client.update_run, run_id, status="RUNNING")
                return run
        except Exception as error:
            absent = isinstance(error, MlflowException) and error.error_code == "RESOURCE_DOES_NOT_EXIST"
            if not (absent and (anew or store == here)):
                begun = f" It was begun in tracking.uri={store}." if store not in (None, here) else ""
                raise ConfigError(
                    f"MLflow run {run_id}: cannot be resumed in tracking.uri={self.uri}"
                    f" ({first_line(error)}).{begun} With tracking=none training goes on without MLflow,"
                    " which can get all epochs later."
                ) from error
        logger.warning(
            "MLflow run %s is not, or no longer, in tracking.experiment=%s of %s: a new run gets all epochs.",
            *(run_id, self.experiment, here),
        )
        return None

    def log(self, metrics: Mapping[str, float], epoch: int, timestamp_ms: int | None = None) -> None:
        """Log one epoch's metrics, but for the entries of matrices, which are in files of the run.

        MLflow's step is the epoch's number.

        `timestamp_ms` is in milliseconds since 1970, now if None. MLflow doubles a metric that is sent
        again with another timestamp, and not one with the same; of two at one epoch it shows the later.
        """
        when = self._now() if timestamp_ms is None else timestamp_ms
        self._latest = max(self._latest, when)
        # MLflow's pages show metrics in the order of their arrival, and the compare page plots the first
        names = sorted((name for name in metrics if not MATRIX_ENTRY.search(name)), key=importance)
        self._send(f"epoch {epoch}", "metrics", [(name, float(metrics[name]), when, epoch) for name in names])

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file to the run's artifacts, there into `folder`. The only call that may wait long."""
        self._send(path.name, "file", (str(path.absolute()), folder), UPLOAD_SECONDS)

    def log_datasets(self, splits: Mapping[str, DatasetSplit]) -> None:
        """Name what the run works on in MLflow's own field, by what it is for: `train`, `val` or `test`."""
        self._send("data sets", "data sets", [(use, *split) for use, split in splits.items()])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run, or replace them."""
        self._send("tags", "tags", list(valid_tags(tags).items()))

    def watch_system(self) -> None:
        """Log the load of CPU, memory, disk, network and GPUs until the run ends, if that is switched on."""
        if self.system_metrics:
            try:
                self._monitor = self.store.call(ANSWER_SECONDS, start_monitor, self.uri, self.run_id)
            except Exception as error:
                logger.warning("There are no system metrics of this run: %s", first_line(error))

    def how_to_open(self) -> str:
        """What to start to look at the run, and the address of its page; in one or two lines."""
        return how_to_open(self.uri, self.store.experiment_id, self.run_id)

    def finish(self, status: str) -> None:
        """End the run as `FINISHED`, `FAILED` or `KILLED`, after a last attempt to send what is unsent.

        If it is killed, that takes seconds at most, and files are left to the run that is resumed.
        """
        if self._monitor is not None:
            with suppress(Exception):  # what the store does not take within this time is lost
                call_within(SEND_SECONDS, self._monitor.finish)
            self._monitor = None
        if self._outbox is not None:
            self._outbox.finish(status, self._now())

    def _now(self) -> int:
        """Milliseconds since 1970; never before a time that the run has, maybe of another clock."""
        return max(time.time_ns() // 1_000_000, self._latest)

    def _send(self, what: str, kind: str, content: Any, *seconds: float) -> None:
        if self._outbox is not None and content:
            self._outbox.add(Request(what, kind, content), *seconds)


def importance(metric: str) -> tuple[int, int, bool]:
    """What a reader asks for first: results before training, the primary predictor before the others."""
    split, _, rest = metric.partition("/")
    known = ("final", "best", "test", "val", "train")
    return known.index(split) if split in known else len(known), rest.count("/"), rest != "top1"


class NoTracking:
    """The interface of `MLflow`; keeps nothing, and finds no runs."""

    checkpoints = False
    run_id = ""

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    open = finish_ended_runs = _nothing
    log = log_artifact = log_datasets = set_tags = watch_system = finish = _nothing

    def start(self, *_: Any, **__: Any) -> str:
        """Return an empty run ID."""
        return ""

    def how_to_open(self) -> str:
        """There is no page."""
        return ""

    def find(self, *_: Any, **__: Any) -> list["Run"]:
        """There are no runs to find."""
        return []
