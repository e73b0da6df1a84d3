"""What a run sends to its store: at once if the store answers, else later, or by the next command."""

import logging
import time
from collections import deque
from pathlib import Path

from okddip.errors import ConfigError
from okddip.tracking.store import ANSWER_SECONDS, Store
from okddip.tracking.unsent import Request, is_temporary, names_of, save_unsent, send
from okddip.tracking.waiting import first_line

logger = logging.getLogger(__name__)

SEND_SECONDS = 0.8  # what an epoch waits for one answer
RETRY_SECONDS = 10.0  # how long a store that does not answer is left alone
UPLOAD_SECONDS = 120.0  # a server may store a large file before it answers
FINISH_SECONDS = 60.0  # for all that is unsent at the end, as long as the store answers; for files as well
KILL_SECONDS = 3.0  # the same where the run is killed


class Queue(deque[Request]):
    """Requests in their order. One that fails for now stays, with all behind it."""

    retry_at: float | None = None  # by the monotonic clock; None if the last one did not fail

    def is_due(self) -> bool:
        """Whether the store answers, or was left alone for long enough."""
        return self.retry_at is None or time.monotonic() >= self.retry_at


class Outbox:
    """What a run has to send: requests, and files, for which nothing else waits.

    Args:
        store: gets it.
        run_id: of the run.
        folder: of the run; keeps what is unsent at the end.
    """

    def __init__(self, store: Store, run_id: str, folder: Path | None) -> None:
        self.store = store
        self.run_id = run_id
        self.folder = folder
        self.requests = Queue()
        self.files = Queue()

    def add(self, request: Request, upload: float = SEND_SECONDS) -> None:
        """Send a request after those that are unsent, unless the store did not answer a moment ago.

        A file may take `upload` seconds.
        """
        (self.files if request.kind in ("text", "file") else self.requests).append(request)
        sent = self.requests.is_due() and self.flush(self.requests, SEND_SECONDS, SEND_SECONDS)
        if sent and self.files.is_due():
            self.flush(self.files, FINISH_SECONDS, upload)

    def flush(self, queue: Queue, patience: float, answer: float) -> bool:
        """Send what is in a queue; whether all is sent.

        After `patience` seconds no request is begun, `answer` seconds are waited for one.
        """
        end = time.monotonic() + patience
        while queue and time.monotonic() < end:
            request, failed_before = queue[0], queue.retry_at is not None
            try:
                self.store.call(answer, send, self.store.client, self.run_id, request)
            except Exception as error:
                if is_temporary(error):
                    if not failed_before:
                        logger.warning(
                            "MLflow at %s does not take %s (%s). Training goes on; what is unsent is kept,"
                            " and sent when it answers again.",
                            *(self.store.uri, request.what, first_line(error)),
                        )
                    queue.retry_at = time.monotonic() + RETRY_SECONDS
                    return False
                logger.warning("MLflow at %s refuses %s: %s", self.store.uri, request.what, first_line(error))
            if failed_before:
                logger.info("MLflow at %s answers again.", self.store.uri)
            queue.retry_at = None
            queue.popleft()
        return not queue

    def finish(self, status: str, timestamp_ms: int) -> None:
        """End the run, after a last attempt to send what is unsent.

        If the run is killed, that takes seconds at most, and files are left to the run that is resumed.
        """
        end = Request("status", "end", (status, timestamp_ms))
        if status == "KILLED":
            self.store.lock_seconds = 0.0
            self.files.clear()
            self.requests.append(end)
            self.flush(self.requests, KILL_SECONDS, KILL_SECONDS)
        else:
            answers = self.flush(self.requests, FINISH_SECONDS, ANSWER_SECONDS)
            if answers and self.files.is_due():
                self.flush(self.files, FINISH_SECONDS, UPLOAD_SECONDS)
            self.requests.append(end)
            if answers:  # whatever has become of the files
                self.flush(self.requests, FINISH_SECONDS, ANSWER_SECONDS)
        if self.requests or self.files:
            self.keep_unsent()

    def keep_unsent(self) -> None:
        """Leave the end of the run, with what else is unsent, to the next command."""
        unsent, kept = [*self.requests, *self.files], ""
        if self.folder is not None and self.requests:  # a run that has its end is not looked for
            try:
                path = save_unsent(self.folder, self.run_id, unsent)
                kept = (
                    f" It is kept in {path}; the next command on this machine that opens this store sends it."
                )
            except ConfigError as error:
                kept = f" That cannot be kept ({error})."
        logger.warning(
            "MLflow at %s does not answer: its run %s lacks %s.%s",
            *(self.store.uri, self.run_id, names_of(unsent), kept),
        )
        self.requests.clear()
        self.files.clear()
