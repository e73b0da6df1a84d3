"""With how many threads a run computes: chosen, recorded, and taken up again."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from conftest import Answer
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from okddip.errors import ConfigError
from okddip.run.parts import Parts
from okddip.tasks.threads import choose_threads
from okddip.training import checkpoint
from okddip.training.threads import FLOPS_A_THREAD, computing_with, default_threads, step_flops

Okddip = Callable[..., Answer]
SyntheticParts = Callable[..., Parts]
QUICK = ("experiment=quickstart", "method=baseline", "trainer.epochs=1", "trainer.limit_batches=1")


@pytest.fixture
def eight_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with computing_with(8):
        yield


@pytest.mark.usefixtures("eight_threads")
@pytest.mark.parametrize(
    ("flops", "threads"),
    [(0.1, 1), (1.9, 1), (2.1, 2), (5, 5), (100, 8), (None, 8)],
)
def test_small_steps_have_one_thread_and_large_ones_all(flops: float | None, threads: int) -> None:
    assert default_threads(lambda: flops and flops * FLOPS_A_THREAD) == threads


@pytest.mark.usefixtures("eight_threads")
def test_jobs_side_by_side_have_one_thread_and_the_variable_overrules_the_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert default_threads(lambda: None, side_by_side=True) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert default_threads(lambda: 1.0) == 8


def test_the_operations_of_a_step_are_those_of_its_forward_and_backward_pass(
    synthetic_parts: SyntheticParts,
) -> None:
    parts = synthetic_parts("model=resnet8", "trainer.batch_size=8")
    before = {name: value.clone() for name, value in parts.group.state_dict().items()}
    counted = step_flops(parts.group, (3, 8, 8), 8)
    with FlopCounterMode(display=False) as counter:
        parts.group.train()(torch.zeros(8, 3, 8, 8)).logits.sum().backward()
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.05)
    # batch statistics have seen the real batch alone
    step_flops(parts.group, (3, 8, 8), 8)
    assert all(value.device.type == "cpu" for value in parts.group.state_dict().values())
    assert before.keys() == parts.group.state_dict().keys()


@pytest.mark.usefixtures("eight_threads")
@pytest.mark.parametrize(
    ("given", "began_with", "taken"),
    [(None, 5, 5), (3, 5, 3), (None, None, 8), (None, "new", 1), (3, "new", 3)],
)
def test_a_resumed_run_takes_the_threads_that_it_began_with_unless_told_otherwise(
    synthetic_parts: SyntheticParts, given: int | None, began_with: Any, taken: int
) -> None:
    parts = synthetic_parts("model=resnet8", "method=baseline", "trainer.batch_size=4")
    config = OmegaConf.create({"trainer": {"threads": given}})
    parts.trainer.threads = given
    state = None if began_with == "new" else {"config": {"trainer": {"threads": began_with}}}
    choose_threads(config, parts, state)
    assert config.trainer.threads == parts.trainer.threads == taken


def test_the_threads_of_a_run_are_recorded_and_in_the_command_that_repeats_it(
    okddip: Okddip, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    answer = okddip(*QUICK, "hydra.run.dir=run", "trainer.threads=2")
    assert answer.code == 0, answer.err
    assert "cpu, fp32, 2 threads" in answer.out
    assert torch.get_num_threads() == before
    assert checkpoint.load(tmp_path / "run" / "last.pt")["config"]["trainer"]["threads"] == 2
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("okddip").experiment_id])
    assert run.data.params["trainer.threads"] == "2"
    assert " trainer.threads=2" in okddip("task=report", f"report.run={run.info.run_id}").out


@pytest.mark.parametrize("threads", [0, -1, 1.5, "two", 100000])
def test_a_number_of_threads_that_cannot_be_is_refused(
    synthetic_parts: SyntheticParts, threads: object
) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.threads={threads}: must be a whole number"):
        synthetic_parts(f"trainer.threads={threads}")


def test_threads_wait_passively_unless_the_user_has_said_how() -> None:
    assert os.environ["OMP_WAIT_POLICY"]  # set when the program is imported
