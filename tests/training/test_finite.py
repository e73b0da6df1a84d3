"""What is not finite is refused wherever it would become a number that looks like a result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from conftest import Answer
from torch import nn

import okddip as package
from okddip.training import checkpoint
from okddip.training.finite import not_finite

Okddip = Callable[..., Answer]
NAN = float("nan")
SMALL = (
    *("dataset=digits", "model=resnet8", "method=baseline", "trainer.epochs=1", "trainer.limit_batches=1"),
)
EVALUATE = ("task=evaluate", "hydra.run.dir=evaluation")


@pytest.fixture
def state(okddip: Okddip) -> dict[str, Any]:
    """Of a whole run in `run`."""
    assert okddip(*SMALL, "tracking=none", "hydra.run.dir=run").code == 0
    return checkpoint.load(Path("run/last.pt"))


def times(weights: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    return {
        name: tensor * factor if tensor.is_floating_point() else tensor for name, tensor in weights.items()
    }


def save(state: dict[str, Any], path: str, **changed: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save({**state, **changed}, path)


def one_bad(weights: dict[str, torch.Tensor], value: float) -> dict[str, torch.Tensor]:
    """A copy of which one number of one parameter is another."""
    changed = {name: tensor.clone() for name, tensor in weights.items()}
    [name] = [name for name in changed if name.endswith("classifier.weight")]
    changed[name][0, 0] = value
    return changed


@pytest.mark.slow
def test_weights_that_are_not_finite_are_refused_in_every_use(okddip: Okddip, state: dict[str, Any]) -> None:
    for name, value in (("nan", NAN), ("infinity", float("inf"))):
        save(state, f"{name}/last.pt", group=one_bad(state["group"], value))
        for command in (
            (*EVALUATE, f"checkpoint={name}/last.pt"),
            ("task=export", f"checkpoint={name}/last.pt", "export.formats=[safetensors]"),
            (*SMALL, "method=kd", f"method.teacher={name}/last.pt"),
            (*SMALL, f"trainer.resume={name}/last.pt", "trainer.epochs=2"),
        ):
            answer = okddip(*command, "tracking=none")
            assert answer.code == 1, command
            assert "The checkpoint of epoch 1 holds numbers that are not finite (group: " in answer.err
            assert "classifier.weight)" in answer.err
            assert "Take another checkpoint" in answer.err
            if "method=kd" in command:
                assert f"method.teacher={name}/last.pt: The checkpoint" in answer.err


def test_a_momentum_that_is_not_a_number_is_refused_before_it_ruins_the_weights(
    okddip: Okddip, state: dict[str, Any]
) -> None:
    optimizer = state["optimizer"]
    optimizer["state"][0]["momentum_buffer"][:] = NAN
    save(state, "broken/last.pt", optimizer=optimizer)
    answer = okddip(*SMALL, "tracking=none", "trainer.resume=broken/last.pt", "trainer.epochs=2")
    assert answer.code == 1
    assert "not finite (optimizer: momentum_buffer)" in answer.err


@pytest.mark.slow
def test_an_evaluation_whose_losses_overflow_names_them_and_reports_nothing(
    okddip: Okddip, state: dict[str, Any], tmp_path: Path
) -> None:
    save(state, "huge/last.pt", group=times(state["group"], 1e20))
    answer = okddip(*EVALUATE, "checkpoint=huge/last.pt")
    assert answer.code == 1
    assert "checkpoint, epoch 1: on these images loss, hard_loss, student is not finite" in answer.err
    assert "trainer.precision=fp32 may help" in answer.err
    assert not Path("evaluation/evaluation.json").exists()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("okddip")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    assert not run.data.metrics


def test_an_export_that_is_not_finite_is_not_loaded(okddip: Okddip, state: dict[str, Any]) -> None:
    from safetensors.torch import load_file, save_file

    answer = okddip("task=export", "checkpoint=run", "export.formats=[safetensors]", "export.out=out")
    assert answer.code == 0, answer.err
    weights = load_file("out/model.safetensors")
    save_file(times(weights, NAN), "out/model.safetensors")
    with pytest.raises(package.errors.ConfigError, match="out: its weights are not finite"):
        package.load("out")
    save_file(weights, "out/model.safetensors")
    notes = Path("out/model.json")
    notes.write_text(notes.read_text().replace('"std": [', '"std": [NaN, '))
    with pytest.raises(package.errors.ConfigError, match="is damaged"):
        package.load("out")


def test_a_mask_of_infinities_is_no_broken_weight() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.full((2,), float("-inf")))
    assert not_finite(module) == ""
    module.mask[0] = NAN
    assert not_finite(module) == "mask"


def test_a_loss_that_is_not_finite_in_an_evaluation_leaves_no_checkpoint(
    okddip: Okddip, tmp_path: Path
) -> None:
    small = ("dataset=digits", "model=resnet8", "method=baseline", "trainer.epochs=1", "tracking=none")
    answer = okddip(*small, "trainer.limit_batches=1", "optimizer.lr=1e30", "hydra.run.dir=run")
    assert answer.code == 1
    assert "Epoch 1: loss, hard_loss is not finite" in answer.err
    assert not (tmp_path / "run" / "last.pt").exists()


def test_an_epoch_that_ruins_the_weights_leaves_no_checkpoint_without_an_evaluation_too(
    okddip: Okddip, tmp_path: Path
) -> None:
    small = ("dataset=digits", "model=resnet8", "method=baseline", "tracking=none", "hydra.run.dir=run")
    answer = okddip(
        *small,
        *("trainer.epochs=8", "trainer.limit_batches=1", "trainer.eval_every=8", "optimizer.lr=0.01"),
        *("scheduler.milestones=[2]", "scheduler.gamma=1e38"),
    )
    assert answer.code == 1
    assert "Epoch 3: loss, hard_loss is not finite" in answer.err
    assert checkpoint.load(tmp_path / "run" / "last.pt")["epoch"] == 1
