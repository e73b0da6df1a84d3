"""Jobs that joblib runs side by side: which GPU each takes, and that none outlives its sweep."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from hydra.core.hydra_config import HydraConfig

from okddip.sweeps.environment import PROCESS, is_job

PATIENCE = 5.0  # seconds for a killed process to be gone


def choose_gpu(gpus: int) -> int | None:
    """Which of the visible GPUs a job takes that joblib runs beside others; None for any other run.

    Jobs take them in turn: of four, job 6 of a sweep takes GPU 2. It is no setting, so a job is the same on
    any of them. CUDA_VISIBLE_DEVICES would not do: CUDA reads it once, and joblib's processes run job after
    job. Launchers for clusters give each job GPUs of its own.
    """
    if not HydraConfig.initialized() or not is_job():
        return None
    return HydraConfig.get().job.num % gpus if is_joblib_job() else None


def is_joblib_job() -> bool:
    return str(HydraConfig.get().launcher._target_).endswith("JoblibLauncher")


# held by this process while it works on a job
_working = threading.Lock()


@contextmanager
def while_sweep_lives() -> Iterator[None]:
    """Within, a process of joblib's has a job; without one it ends when that of the sweep was killed.

    Joblib would keep it waiting for good, with all of its memory and that of a GPU.
    """
    sweep = os.environ.get(PROCESS)
    if is_joblib_job() and sweep and int(sweep) != os.getpid():  # with n_jobs=1 jobs run in the sweep's own
        exit_when_gone(int(sweep))
    with _working:
        yield


@cache
def exit_when_gone(sweep: int) -> None:
    """End this process, a child of the sweep's, after its job when that one is gone."""

    def watch() -> None:
        while os.getppid() == sweep:
            time.sleep(PATIENCE)
        with _working:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
