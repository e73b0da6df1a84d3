"""Jobs side by side: their teacher, threads and GPUs, and that none outlives its sweep."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from program import REPOSITORY
from sweep_helpers import SMALL, outcomes, runs

from okddip.errors import ConfigError
from okddip.sweeps.environment import SweepInfo
from okddip.sweeps.joblib import choose_gpu, is_side_by_side
from okddip.training.devices import find_device


def start(folder: Path, *overrides: str) -> "subprocess.Popen[str]":
    """A sweep as a shell starts it: joblib's processes hang on a Python of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "okddip.main", *overrides],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_job_of_joblib_shares_the_machine_unless_the_user_named_its_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = OmegaConf.create({"hydra": {"job": {"num": 1}, "launcher": {"_target_": "a.JoblibLauncher"}}})
    monkeypatch.setattr(HydraConfig.instance(), "cfg", config)
    monkeypatch.setenv("OKDDIP_SWEEP", "{}")
    SweepInfo(process=os.getpid() + 1).publish()
    assert is_side_by_side()
    SweepInfo(process=os.getpid() + 1, threads_named=True).publish()
    assert not is_side_by_side()
    SweepInfo(process=os.getpid()).publish()  # one job at a time, in the process of the sweep
    assert not is_side_by_side()
    config.hydra.launcher._target_ = "a.BasicLauncher"
    SweepInfo(process=os.getpid() + 1).publish()
    assert not is_side_by_side()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
        ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"),
    ],
    ids=["joblib", "submitit"],
)
def test_jobs_side_by_side_are_children_of_one_parent_and_share_a_teacher(
    tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    process = start(
        tmp_path,
        *("-m", *SMALL, *launcher, "method=kd", "method.teacher=auto", "method.teacher_model=resnet14"),
        *("method.temperature=2,3", "method.peers=1,4", "hydra.sweep.dir=sweep"),
    )
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert [kind for _, kind in outcomes(tmp_path / "sweep")] == ["finished", "skipped"] * 2
    [parent] = runs(tmp_path, "parents")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs(tmp_path)} == {parent.info.run_id}
    assert [run.info.status for run in [parent, *runs(tmp_path)]] == ["FINISHED"] * 3
    assert [run.info.run_name for run in runs(tmp_path, "others")] == [
        "teacher baseline1-seed0-network-resnet14-digits"
    ]


THREADS = """
from pathlib import Path
import torch
from hydra.core.hydra_config import HydraConfig


def count(config, build):
    Path(HydraConfig.get().runtime.output_dir, "threads").write_text(str(torch.get_num_threads()))
    return 0.0
"""


@pytest.mark.slow
def test_threads_are_divided_among_the_jobs_of_joblib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "threads.py").write_text(THREADS)
    cores = len(os.sched_getaffinity(0))
    command = [
        "-m",
        "task._target_=threads.count",
        "seed=0,1",
        "hydra/launcher=joblib",
        "hydra.sweep.dir=sweep",
    ]
    finished = subprocess.run(
        [sys.executable, "-m", "okddip.main", *command, f"hydra.launcher.n_jobs={cores}"],
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert [path.read_text() for path in tmp_path.glob("sweep/*/threads")] == ["1", "1"]


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> list[torch.device]:
    """Let PyTorch see GPUs; the list gets those that become the current one."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(("gpus", "taken"), [(1, [0, 0, 0, 0, 0]), (3, [0, 1, 2, 0, 1])])
def test_jobs_side_by_side_take_the_visible_gpus_in_turn(
    configured: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, gpus: int, taken: list[int]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    current = pretend_gpus(monkeypatch, gpus)
    devices = []
    for job in range(5):
        configured("hydra/launcher=joblib", f"hydra.job.num={job}")
        devices += [find_device("auto", choose_gpu), find_device("cuda", choose_gpu)]
    assert devices == current == [torch.device("cuda", gpu) for gpu in taken for _ in range(2)]
    assert find_device("cuda:0", choose_gpu) == torch.device("cuda:0")
    assert find_device("cpu", choose_gpu) == torch.device("cpu")
    assert current[10:] == [torch.device("cuda:0")]  # the one that is named; none for the CPU


@pytest.mark.parametrize(
    "overrides", [[], ["hydra.job.num=1"], ["hydra/launcher=joblib"]], ids=["run", "sequential", "no job"]
)
def test_a_run_that_has_no_other_beside_it_takes_the_current_gpu(
    configured: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    current = pretend_gpus(monkeypatch, 3)
    configured(*overrides)
    assert find_device("auto", choose_gpu) == find_device("cuda", choose_gpu) == torch.device("cuda")
    assert current == []


def test_without_a_gpu_jobs_side_by_side_train_on_the_cpu(
    configured: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    pretend_gpus(monkeypatch, 0)
    configured("hydra/launcher=joblib", "hydra.job.num=1")
    assert find_device("auto", choose_gpu) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"trainer\.device=cuda: PyTorch sees 0 CUDA devices"):
        find_device("cuda", choose_gpu)


DEVICES = """
import os
from pathlib import Path
import torch
from hydra.core.hydra_config import HydraConfig
from okddip.run.identity import run_identity
from okddip.sweeps.environment import SweepInfo
from okddip.sweeps.joblib import choose_gpu, is_side_by_side
from okddip.training.devices import find_device

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 3
torch.cuda.set_device = lambda device: None


def note(config, build):
    facts = f"{find_device(config.trainer.device, choose_gpu)} {run_identity(config)} {os.getpid()}"
    Path(HydraConfig.get().runtime.output_dir, "facts").write_text(facts)
    return 0.0
"""


@pytest.mark.slow
def test_a_job_is_the_same_on_whatever_gpu_it_runs(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "devices.py").write_text(DEVICES)

    def facts(folder: str, *launcher: str) -> list[list[str]]:
        command = [sys.executable, "-m", "okddip.main", "-m", "task._target_=devices.note", "seed=0,1,2,3,4"]
        finished = subprocess.run(
            [*command, f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=${hydra.job.num}", *launcher],
            env=os.environ | {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}"},
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return [(tmp_path / folder / str(job) / "facts").read_text().split() for job in range(5)]

    beside = facts("beside", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    alone = facts("alone")
    assert [device for device, _, _ in beside] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]
    assert [device for device, _, _ in alone] == ["cuda"] * 5
    assert [identity for _, identity, _ in beside] == [identity for _, identity, _ in alone]
    assert len({process for _, _, process in beside}) < 5  # one process has jobs on several GPUs


def processes_of(session: int) -> list[int]:
    """Of a session, those that are no zombies."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its = (process / "stat").read_text().rpartition(") ")[2].split()[:4]
        except (OSError, ValueError):  # it has ended
            continue
        if int(its) == session and state != "Z":
            found.append(int(process.name))
    return found


@pytest.mark.slow
def test_processes_of_joblib_end_with_their_sweep_when_it_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    command = (
        *("-m", *SMALL, "method=baseline", "seed=0,1,2", "trainer.epochs=60", "hydra.sweep.dir=sweep"),
        *("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    )
    sweep = start(tmp_path, *command)
    while len(list(tmp_path.glob("sweep/*/previous.pt"))) < 2:
        assert sweep.poll() is None, sweep.communicate()[0]
        time.sleep(0.01)
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()
    deadline = time.monotonic() + 10
    while left := processes_of(sweep.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    output, _ = start(tmp_path, *command).communicate(timeout=300)
    assert "Sweep seed, 3 jobs: 3 finished." in output
    assert output.count("; resumes after epoch") == 2
    assert [run.info.status for run in runs(tmp_path, "parents") + runs(tmp_path)] == ["FINISHED"] * 4


@pytest.mark.slow
def test_a_sweep_of_one_process_of_joblib_outlives_the_shell_that_started_it(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    command = [sys.executable, "-m", "okddip.main", "-m", *SMALL, "method=baseline", "seed=0,1,2"]
    command += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=1", "hydra.sweep.dir=sweep", "tracking=none"]
    command += ["trainer.epochs=60"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    until_it_trains = "while [ ! -e sweep/0-*/previous.pt ]; do sleep 0.1; done"
    shell = f"{shlex.join(command)} > log 2>&1 & {until_it_trains}"
    subprocess.run(shell, shell=True, cwd=tmp_path, env=environment, timeout=120)
    deadline = time.monotonic() + 300
    while "Sweep seed, 3 jobs: 3 finished." not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.5)
