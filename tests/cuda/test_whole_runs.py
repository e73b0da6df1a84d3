"""Whole runs: killed and resumed, taken to another device, and where the memory is full."""

import gc
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from on_device import CUDA, SLOW_ON_CPU, learned, run, start

from okddip.training.step import ForwardStep

Okddip = Callable[..., Any]
SMALL = ("dataset=digits", "model=resnet8", "optimizer.lr=0.02", "tracking=none", "trainer.batch_size=64")


@pytest.mark.parametrize("device", SLOW_ON_CPU)
def test_a_run_that_was_killed_and_resumed_ends_with_the_same_bits(device: str, tmp_path: Path) -> None:
    command = (
        *(*SMALL, f"trainer.device={device}", "trainer.deterministic=true"),
        *("trainer.epochs=12", "trainer.limit_batches=6", "methods.ramp_epochs=8"),
    )
    killed = start(*command, "hydra.run.dir=killed")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 2:
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.002)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL, "it was quicker than the kill"
    killed.communicate()
    run(*command, "trainer.resume=killed")
    run(*command, "hydra.run.dir=whole")
    ours, whole = learned(tmp_path / "killed"), learned(tmp_path / "whole")
    assert ours.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(ours[name], value), name


ANOTHER = pytest.mark.parametrize(
    ("trained", "used"),
    [
        pytest.param("cpu", "cpu", marks=pytest.mark.slow),
        pytest.param("cuda", "cpu", marks=CUDA.marks),
        pytest.param("cpu", "cuda", marks=CUDA.marks),
    ],
)


def train_on(okddip: Okddip, device: str, *overrides: str) -> None:
    fp32 = ("trainer.precision=fp32", "trainer.tf32=false", f"trainer.device={device}")
    answer = okddip(*SMALL, *fp32, *overrides)
    assert answer.code == 0, answer.err


@ANOTHER
def test_a_run_goes_on_on_another_device(okddip: Okddip, trained: str, used: str) -> None:
    train_on(okddip, trained, "trainer.epochs=2", "hydra.run.dir=run")
    train_on(okddip, used, "trainer.epochs=3", "trainer.resume=run")
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert lines[2]["train/loss"] < lines[0]["train/loss"]


@ANOTHER
def test_a_checkpoint_evaluates_on_another_device_to_what_the_run_reported(
    okddip: Okddip, trained: str, used: str
) -> None:
    pytest.importorskip("matplotlib")
    train_on(okddip, trained, "trainer.epochs=2", "hydra.run.dir=run")
    command = ("checkpoint=run", "tracking=none", f"trainer.device={used}")
    answer = okddip("task=evaluate", *command, "hydra.run.dir=evaluated")
    assert answer.code == 0, answer.err
    reported = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    measured = json.loads(Path("evaluated/evaluation.json").read_text())["metrics"]
    assert measured["loss"] == pytest.approx(reported["test/loss"], rel=1e-3)
    assert measured["top1"] == pytest.approx(reported["test/top1"], abs=1)  # of 359 images three


@ANOTHER
def test_a_checkpoint_is_exported_and_predicts_the_same_on_another_device(
    okddip: Okddip, trained: str, used: str, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    from okddip.deployment.loading import load

    train_on(okddip, trained, "trainer.epochs=2", "hydra.run.dir=run")
    export = ("task=export", "checkpoint=run", "tracking=none", "export.formats=[safetensors]")
    answer = okddip(*export, "export.out=out")
    assert answer.code == 0, answer.err
    images = torch.randint(256, (8, 16, 16, 1), dtype=torch.uint8)
    here, there = (load(tmp_path / "out").to(device).predict_proba(images) for device in (trained, used))
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("trained", [CUDA])
def test_a_run_is_served_on_a_cpu(okddip: Okddip, trained: str, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    answer = okddip(*SMALL, f"trainer.device={trained}", "trainer.epochs=1", "hydra.run.dir=run")
    assert answer.code == 0, answer.err
    command = ("task=export", "checkpoint=run", "tracking=none", "export.formats=[mlflow]", "export.out=out")
    answer = okddip(*command)
    assert answer.code == 0, answer.err
    table = mlflow.pyfunc.load_model(str(tmp_path / "out" / "mlflow")).predict(
        torch.zeros(2, 16, 16, 1, dtype=torch.uint8).numpy()
    )
    assert list(table.columns) == ["label", "probabilities"]


@contextmanager
def full_memory(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that has memory for the peers, and none for a batch; on the CPU, a step that fails so."""
    whole = ForwardStep.step

    def step(self: ForwardStep, *given: Any) -> Any:
        if device == "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
        gc.collect()
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**21) / total)
        return whole(self, *given)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(ForwardStep, "step", step)
            yield
    finally:
        if device != "cpu":
            torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_batch_too_large_for_the_memory_costs_no_checkpoint(
    okddip: Okddip, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = (*SMALL, "trainer.batch_size=1024", "trainer.limit_batches=1", f"trainer.device={device}")
    answer = okddip(*large, "trainer.epochs=1", "hydra.run.dir=run")
    assert answer.code == 0, answer.err
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with full_memory(device, monkeypatch):
        answer = okddip(*large, "trainer.epochs=2", "trainer.resume=run")
    assert answer.code == 1
    assert "memory of c" in answer.err
    assert "is full (CUDA out of memory)" in answer.err
    assert "Traceback" not in answer.err
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    answer = okddip(*large, "trainer.epochs=2", "trainer.resume=run")
    assert answer.code == 0, answer.err
    assert learned(tmp_path / "run")


HOLD = """
import sys, time, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - 2**28, dtype=torch.uint8, device="cuda")
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("device", [CUDA])
def test_another_process_that_has_the_memory_of_the_gpu_is_an_error_of_ours(
    device: str, tmp_path: Path
) -> None:
    common = (*SMALL, f"trainer.device={device}", "trainer.batch_size=1024")
    run(*common, "trainer.epochs=1", "hydra.run.dir=run")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    gc.collect()
    torch.cuda.empty_cache()
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        second = start(*common, "trainer.epochs=2", "trainer.resume=run")
        output, _ = second.communicate(timeout=120)
    finally:
        holder.kill()
        holder.wait()
    assert second.returncode == 1, output
    assert "cannot be used (" in output or "is full (" in output, output
    assert "Traceback" not in output
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    run(*common, "trainer.epochs=2", "trainer.resume=run")
    assert learned(tmp_path / "run")
