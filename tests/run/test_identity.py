"""Runs of older versions are recognised, whatever has moved since."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer
from omegaconf import DictConfig

from okddip.older_versions import MOVED
from okddip.run.identity import run_identity
from okddip.training import checkpoint

SMALL = (
    *("dataset=digits", "model=resnet8", "method=baseline", "tracking=none"),
    *("trainer.limit_batches=1", "hydra.run.dir=run"),
)


@pytest.mark.parametrize(
    ("overrides", "identity"),
    [
        ((), "93ec6eccb6b09775"),
        (("experiment=quickstart",), "f21d1110e48bef95"),
        (("method=kd", "method.teacher=x", "scheduler=cosine", "tracking=none"), "d60cb37c2a58e5bd"),
    ],
    ids=["default", "quickstart", "kd"],
)
def test_the_identity_of_a_configuration_is_that_of_version_0_1_0(
    configured: Callable[..., DictConfig], overrides: tuple[str, ...], identity: str
) -> None:
    assert run_identity(configured(*overrides)) == identity


@pytest.mark.parametrize(
    "setting",
    [
        *("trainer.drop_last=true", "trainer.deterministic=true", "method.views=each"),
        *("method.ema_decay=0.9", "model.peers=[resnet8,resnet20]"),
    ],
)
def test_a_setting_that_came_later_makes_another_run_where_it_is_not_at_its_default(
    configured: Callable[..., DictConfig], setting: str
) -> None:
    default, other = configured(), configured(setting)
    assert run_identity(default) != run_identity(other)


def test_the_number_of_threads_makes_no_other_run(configured: Callable[..., DictConfig]) -> None:
    assert run_identity(configured()) == run_identity(configured("trainer.threads=3"))


def named_as_before(config: Any) -> Any:
    """A plain configuration with the names that parts had in version 0.1.0."""
    before = {now: then for then, now in MOVED.items()}
    if isinstance(config, dict):
        return {key: named_as_before(value) for key, value in config.items()}
    return before.get(config, config) if isinstance(config, str) else config


def test_a_run_of_version_0_1_0_is_resumed_and_evaluated(
    okddip: Callable[..., Answer], tmp_path: Path
) -> None:
    assert okddip(*SMALL, "trainer.epochs=1").code == 0
    last = tmp_path / "run" / "last.pt"
    state = torch.load(last, weights_only=True)
    state["config"], state["version"] = named_as_before(state["config"]), "0.1.0"
    assert state["config"]["trainer"]["_target_"] == "okddip.trainer.Trainer"
    torch.save(state, last)
    answer = okddip(*SMALL, "trainer.epochs=2", "trainer.resume=run")
    assert answer.code == 0, answer.err
    assert "was written by okddip 0.1.0" in answer.out
    assert checkpoint.load(last)["epoch"] == 1
    torch.save(state, tmp_path / "old.pt")
    answer = okddip("task=evaluate", "checkpoint=old.pt", "tracking=none")
    assert answer.code == 0, answer.err
