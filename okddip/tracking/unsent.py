"""Calls of a store as plain data, so that what a run could not send outlives its process.

A run that is over may be called running for two reasons: its process was killed outright, or the store did
not answer when it ended. In the second case the run leaves what is unsent as `unsent-ID.json` in its folder.
"""

import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from okddip.files import write_text
from okddip.tracking.params import CONTEXT

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

RUN_LOCK = "run.lock"  # in a training run's folder; locked as long as its process lives
SWEEP_LOCK = ".sweep.lock"  # the same of a sweep, in its folder
LOCK_SECONDS = 5.0  # another command may hold either that long, to see whether the run or sweep has ended
LOCK = "lock"  # the tag of a sweep's parent: a file that is locked as long as the process of its sweep lives


class Request(NamedTuple):
    """One call of a store."""

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
        case "data sets":  # what it is for, name, digest, place, number of images
            inputs = []
            for use, name, digest, place, images in content:
                source, profile = json.dumps({"uri": place}), json.dumps({"num_rows": images})
                dataset = Dataset(name, digest, "local", source, profile=profile)
                inputs.append(DatasetInput(dataset, [InputTag(CONTEXT, use)]))
            client.log_inputs(run_id, datasets=inputs)
        case "text":  # text, name of the artifact
            client.log_text(run_id, *content)
        case "file":  # path, folder among the artifacts or None
            client.log_artifact(run_id, *content)
        case "end":  # status, time (milliseconds since 1970)
            client.set_terminated(run_id, content[0], end_time=content[1])
        case other:
            raise ValueError(f"a request of the kind {other!r}")


def is_temporary(error: Exception) -> bool:
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


def names_of(requests: Sequence[Request]) -> str:
    """What requests are about, for messages."""
    return ", ".join(dict.fromkeys(request.what for request in requests))


def unsent_file(folder: Path, run_id: str) -> Path:
    """Where a run keeps the requests that it could not send."""
    return folder / f"unsent-{run_id}.json"


def save_unsent(folder: Path, run_id: str, requests: Sequence[Request]) -> Path:
    """Keep requests for the next command. A run's end comes last: a run that has its end is not looked for.

    Raises:
        ConfigError: they cannot be written.
    """
    path = unsent_file(folder, run_id)
    write_text(path, json.dumps(sorted(requests, key=lambda request: request.kind == "end")))
    return path


def is_own(path: Path, within: Path | None = None) -> bool:
    """Whether a file or folder is there, is this user's own, and not a link to another place.

    Args:
        within: a folder in which it must lie.
    """
    try:
        own = path.lstat().st_uid == os.getuid() and not path.is_symlink()
        return own and (within is None or within.resolve() in path.resolve().parents)
    except OSError:
        return False


def finish_if_ended(client: "MlflowClient", run: "Run") -> None:
    """Finish a run that is called running if its folder on this machine shows that it is over.

    Raises:
        Exception: whatever the store answers.
    """
    from filelock import FileLock, Timeout

    tags, run_id = run.data.tags, run.info.run_id
    if not tags.get("folder"):
        return
    folder = Path(tags["folder"])
    training = "kind" not in tags and "task" not in tags
    lock = folder / (RUN_LOCK if training else SWEEP_LOCK)
    unsent = unsent_file(folder, run_id)
    # It may be elsewhere, or moved; and others may have written the tags: no file of theirs is opened
    if not is_own(folder) or not (is_own(lock) or is_own(unsent)):
        return
    with ExitStack() as held:
        try:
            if is_own(lock):
                times = [lock.stat().st_mtime_ns]  # before older versions of filelock set it anew
                held.enter_context(FileLock(lock, timeout=0))
        # it goes on, or lies in a folder of somebody else's, or is gone just now
        except (Timeout, PermissionError, FileNotFoundError):
            return
        now = client.get_run(run_id)
        if now.info.status != "RUNNING" or now.data.tags.get(LOCK) != tags.get(LOCK):
            return  # another process was quicker, or has resumed it
        if is_own(unsent):
            send_unsent(client, run_id, unsent)
        else:
            times += [path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file() and path != lock]
            client.set_terminated(run_id, "KILLED", end_time=max(times) // 1_000_000)
            logger.info("MLflow run %s was killed, and is marked so now.", run_id)


def moved_along(request: Request, folder: Path) -> Request:
    """The same file of a run whose folder was moved since."""
    file, *rest = request.content
    here = folder / Path(file).name
    return (
        request if Path(file).exists() or not here.exists() else request._replace(content=[str(here), *rest])
    )


def send_unsent(client: "MlflowClient", run_id: str, path: Path) -> None:
    """Send what a run has kept, and remove it."""
    requests = [Request(*parts) for parts in json.loads(path.read_text(encoding="utf-8"))]
    for request in requests:
        if request.kind == "file":
            request = moved_along(request, path.parent)
        file = Path(request.content[0]) if request.kind == "file" else None
        if file is not None and file.exists() and not is_own(file, within=path.parent):
            logger.warning(
                "MLflow run %s: %s is not a file of the run and is not sent.", run_id, request.what
            )
            continue
        try:
            send(client, run_id, request)
        except Exception as error:
            if is_temporary(error):
                raise
            logger.warning("MLflow run %s cannot get %s: %s", run_id, request.what, error)
    path.unlink()
    logger.info(
        "MLflow run %s, which ended while its store was away, now has %s.", run_id, names_of(requests)
    )
