"""The program in processes of its own that start at once, with what tests use of `subprocess.Popen`.

A Python that imports PyTorch and MLflow computes for seconds before it does anything. Here one process has
imported them, and those of the tests are forks of it. Each has arguments, folder, environment, signals and a
process group of its own, as if a shell had started it.
"""

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
CLI = "from okddip.main import cli\ncli()"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(  # what a run, a sweep and its report import
    [
        *("okddip.main", "okddip.tasks.train", "okddip.tasks.report.task", "okddip.tasks.report.figures"),
        *(
            "okddip.training.trainer",
            "okddip.data.sources",
            "mlflow",
            "mlflow.store.tracking.sqlalchemy_store",
        ),
        *("alembic.command", "sklearn.datasets", "torchvision", "torch._dynamo"),
    ]
)


def become(code: str, arguments: Sequence[str]) -> None:
    """Run code as a Python does that was started for it, with these arguments of the command line."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    # a shell lets its background jobs ignore Ctrl-C, and the tests may be such a job
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["okddip", *arguments]
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    finally:  # as Python ends and a fork does not: in another order, idle workers of joblib are waited for
        threading._shutdown()
        atexit._run_exitfuncs()


def begin(
    code: str, arguments: Sequence[str], folder: str, environment: dict[str, str], outputs: list[Connection]
) -> None:
    os.setsid()
    os.dup2(outputs[0].fileno(), 1)
    os.dup2(outputs[-1].fileno(), 2)
    for output in outputs:
        output.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    become(code, arguments)


class Program:
    """A process of the program, or of other code.

    Args:
        folder: in which it works.
        arguments: of its command line.
        code: what it runs.
        environment: variables beside those of the tests.
        apart: whether it has a pipe of its own for its errors; else they are in the output.
    """

    def __init__(
        self, folder: Path, *arguments: str, code: str = CLI, apart: bool = False, **environment: str
    ) -> None:
        pipes = [SERVER.Pipe(duplex=False) for _ in range(2 if apart else 1)]
        with mock.patch.dict(os.environ, PYTHONPATH=str(REPOSITORY)):
            forkserver.ensure_running()
            variables = {**os.environ, **environment}
        writers = [writer for _, writer in pipes]
        self.process = SERVER.Process(
            target=begin, args=(code, arguments, str(folder), variables, writers), name="okddip"
        )
        self.process.start()
        atexit.register(self.process.kill)  # pytest would wait for one that a failed test has left
        for writer in writers:
            writer.close()
        files = [os.fdopen(os.dup(reader.fileno())) for reader, _ in pipes]
        self.stdout, self.stderr = files[0], files[1] if apart else None
        self.pid = self.process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("okddip", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it says until its end and that of all who write to its pipes."""
        said = ["", ""]

        def read(number: int, file: Any) -> None:
            said[number] = file.read()

        files = [file for file in (self.stdout, self.stderr) if file]
        readers = [threading.Thread(target=read, args=each, daemon=True) for each in enumerate(files)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired("okddip", timeout or 0)
        self.wait(timeout)
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
