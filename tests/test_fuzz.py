"""Configurations drawn at random, valid and not: each builds, or is refused with an error that names it.

FUZZ_EXAMPLES=5000 python -m pytest -m slow tests/test_fuzz.py draws others, and more of them.
"""

import os
from collections.abc import Callable

import pytest
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig

from okddip.errors import ConfigError
from okddip.main import build, check

BASE = ("dataset=digits", "model=resnet8", "tracking=none")
GROUPS = {
    "method": ["okddip", "baseline", "independent", "kd", "dml", "cl_ilr", "one", "nope"],
    "model": ["resnet8", "resnet14", "densenet40_12", "vgg16", "torchvision"],
    "optimizer": ["sgd", "adamw"],
    "scheduler": ["multistep", "cosine", "constant"],
}
# Keys of the groups' options, and what a user may type after them
KEYS = [
    *("seed", "method.peers", "method.structure", "method.temperature", "method.alpha", "method.ramp_epochs"),
    *("method.ramp_start", "method.loss", "method.leader", "method.attention", "method.include_self"),
    *("method.detach_targets", "method.aggregate", "method.projection_factor", "method.rescale"),
    *("method.target", "method.teacher", "model.depth", "model.block", "model.inner_width", "model.dropout"),
    *("model.growth", "model.efficient", "model.name", "model.split", "dataset.root", "dataset.train_size"),
    *("dataset.validation", "dataset.image_size", "dataset.mean", "dataset.std", "dataset.pad"),
    *("dataset.flip", "dataset.on_device", "dataset.device_share", "dataset.cache_dir", "optimizer.lr"),
    *("optimizer.momentum", "optimizer.nesterov", "optimizer.weight_decay", "optimizer.betas"),
    *("optimizer.fused", "scheduler.milestones", "scheduler.gamma", "scheduler.warmup_epochs"),
    *("trainer.epochs", "trainer.batch_size", "trainer.eval_batch_size", "trainer.eval_every"),
    *("trainer.limit_batches", "trainer.device", "trainer.precision", "trainer.channels_last"),
    *("trainer.compile", "trainer.compile_mode", "trainer.fused", "trainer.tf32", "trainer.cudnn_benchmark"),
    *("trainer.gradient_clip", "trainer.resume", "name"),
]
VALUES = [
    *("null", "true", "false", "-1", "0", "1", "2", "3", "4", "16", "0.5", "1.5", "-0.1", "1e30", "1e-9"),
    *(".inf", ".nan", "abc", "''", "[]", "[1]", "[1,2]", "[0.5,0.75]", "[a]", "{}", "{a:1}", "auto", "cpu"),
    *("branch", "network", "kl", "ce", "logits", "bf16", "${seed}", "${nobody}", "???"),
]

overrides = st.tuples(
    st.fixed_dictionaries({}, optional={group: st.sampled_from(names) for group, names in GROUPS.items()}),
    st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=4),
).map(lambda drawn: [f"{key}={value}" for part in drawn for key, value in part.items()])


def builds_or_is_refused(configured: Callable[..., DictConfig], drawn: list[str]) -> None:
    try:
        config = configured(*BASE, *drawn)
    except HydraException:
        return  # no such key or option; Hydra says so
    try:
        check(config)
        build(config)
    except ConfigError:
        pass  # any other error fails the test


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(drawn=overrides)
def test_a_configuration_builds_or_is_refused(
    configured: Callable[..., DictConfig], drawn: list[str]
) -> None:
    builds_or_is_refused(configured, drawn)


@pytest.mark.slow
@settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "500")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize="FUZZ_EXAMPLES" not in os.environ,  # the same ones each time, unless more are asked for
)
@given(drawn=overrides)
def test_hundreds_of_configurations_build_or_are_refused(
    configured: Callable[..., DictConfig], drawn: list[str]
) -> None:
    builds_or_is_refused(configured, drawn)
