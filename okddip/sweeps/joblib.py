"""Jobs that run side by side: which GPU each takes, its threads, and that none outlives its sweep."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from hydra.core.hydra_config import HydraConfig

from okddip.sweeps.environment import SweepInfo, is_job

PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent dies


def choose_gpu(gpus: int) -> int | None:
    """The index of the visible GPU that a job of joblib takes; None for any other run.

    Jobs take GPUs in turn: of four, job 6 of a sweep takes GPU 2. The index is not a setting, so that a job
    has the same identity on any of them. CUDA_VISIBLE_DEVICES would not do: CUDA reads it once, and joblib's
    processes run job after job. Launchers for clusters give each job GPUs of its own.
    """
    if not HydraConfig.initialized() or not is_job():
        return None
    return HydraConfig.get().job.num % gpus if is_joblib_job() else None


def is_joblib_job() -> bool:
    return str(HydraConfig.get().launcher._target_).endswith("JoblibLauncher")


def is_side_by_side() -> bool:
    """Whether this run is a job whose launcher runs several on this machine, and the user named no threads.

    Joblib gives each of its processes a share of the cores in OMP_NUM_THREADS, unless it is set.
    """
    if not HydraConfig.initialized() or not is_job():
        return False
    sweep = SweepInfo.read()
    shared = is_joblib_job() or str(HydraConfig.get().launcher._target_).endswith(
        ".LocalLauncher"
    )  # submitit's
    return shared and sweep.process != os.getpid() and not sweep.threads_named


def end_with_sweep() -> None:
    """In a process of joblib, let the kernel kill it with the process of the sweep; on Linux alone.

    Joblib would keep it waiting for good, with all of its memory and that of a GPU.
    """
    sweep = SweepInfo.read().process
    if not is_joblib_job() or sweep in (0, os.getpid()):  # with n_jobs=1 jobs run in the sweep's own process
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != sweep:  # it is gone already
            os.kill(os.getpid(), signal.SIGKILL)
