"""What a store was not told: kept in the run's folder, and told by the next command that opens the store.

A run that is over may be called running for two reasons: its process was killed outright, or the store did
not answer when it ended. In the second case the run leaves what is unsent as `unsent-ID.json`.
"""

import json
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

RUN_LOCK = "run.lock"  # in a training run's folder; locked as long as its process lives
LOCK = "lock"  # the tag of a sweep's parent: a file that is locked as long as the process of its sweep lives
END = "end"  # the kind of request that ends a run
CONTEXT = "mlflow.data.context"  # the tag of a data set that says what it is for


class Request(NamedTuple):
    """One call of a store as plain data, so that it can outlive its process."""

    what: str  # for messages
    kind: str  # see `send`
    content: Any  # lists, texts and numbers, as JSON holds them


def send(client: "MlflowClient", run_id: str, request: Request) -> None:
    """Make the call that a request describes. MLflow takes the same call twice as one, files apart."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    content = request.content
    match request.kind:
        case "metrics":  # key, value, timestamp (milliseconds since 1970), step
            client.log_batch(run_id, metrics=[Metric(*metric) for metric in content])
        case "params":
            client.log_batch(run_id, params=[Param(*param) for param in content])
        case "tags":
            client.log_batch(run_id, tags=[RunTag(*tag) for tag in content])
        case "data sets":  # fields of a data set, and what it is for
            used = [DatasetInput(Dataset(**fields), [InputTag(CONTEXT, use)]) for fields, use in content]
            client.log_inputs(run_id, datasets=used)
        case "text":  # text, name of the artifact
            client.log_text(run_id, *content)
        case "file":  # path, folder among the artifacts or None
            client.log_artifact(run_id, *content)
        case "end":  # status, time (milliseconds since 1970)
            client.set_terminated(run_id, content[0], end_time=content[1])
        case other:
            raise ValueError(f"a request of the kind {other!r}")


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: no answer, a server in trouble, a locked database."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError, RequestException

    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    elif isinstance(error, HTTPError) and error.response is not None:
        status = error.response.status_code
    else:
        return isinstance(error, RequestException | TimeoutError)
    return status >= 500 or status == 429


def kept(folder: Path, run_id: str) -> Path:
    """Where the requests are kept that a run could not send."""
    return folder / f"unsent-{run_id}.json"


def keep(folder: Path, run_id: str, requests: list[Request]) -> Path:
    """Write requests down for the next command, a run's end last: one that has its end is not looked for.

    Raises:
        OSError: they cannot be written.
    """
    path = kept(folder, run_id)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(sorted(requests, key=lambda request: request.kind == END)), encoding="utf-8")
    new.replace(path)
    return path


def finish_if_ended(client: "MlflowClient", run: "Run") -> None:
    """End a run that is called running if its folder on this machine shows that it is over.

    Raises:
        Exception: whatever the store answers.
    """
    from filelock import FileLock, Timeout

    tags, run_id = run.data.tags, run.info.run_id
    if not tags.get("folder"):
        return
    folder = Path(tags["folder"])
    training = "kind" not in tags and "task" not in tags
    lock = folder / RUN_LOCK if training else Path(tags.get(LOCK, ""))
    unsent = kept(folder, run_id)
    if not (lock.is_file() or unsent.is_file()):  # it is elsewhere, or was moved
        return
    with ExitStack() as held:
        try:
            if lock.is_file():
                held.enter_context(FileLock(lock, timeout=0))
        except (Timeout, PermissionError):  # it goes on, or lies in a folder of somebody else's
            return
        now = client.get_run(run_id)
        if now.info.status != "RUNNING" or now.data.tags.get(LOCK) != tags.get(LOCK):
            return  # another process was quicker, or has taken it up
        if unsent.is_file():
            requests = [Request(*parts) for parts in json.loads(unsent.read_text(encoding="utf-8"))]
            for request in requests:
                try:
                    send(client, run_id, request)
                except Exception as error:
                    if may_pass(error):
                        raise
                    logger.warning("MLflow run %s cannot be told of %s: %s", run_id, request.what, error)
            unsent.unlink()
            told = ", ".join(dict.fromkeys(request.what for request in requests))
            logger.info("MLflow run %s, which ended while its store was away, now has %s.", run_id, told)
        else:
            times = [path.stat().st_mtime_ns // 1_000_000 for path in folder.iterdir() if path.is_file()]
            client.set_terminated(run_id, "KILLED", end_time=max(times))
            logger.info("MLflow run %s was killed, and is now called so.", run_id)
