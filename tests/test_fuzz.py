"""Configurations drawn at random, valid and not: each builds, or is refused with an error that names it.

FUZZ_EXAMPLES=5000 python -m pytest -m slow tests/test_fuzz.py draws others, and more of them.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig

from okddip.assembly import CONFIG_HOME
from okddip.checks import check
from okddip.command_line import check_choices
from okddip.data import sources
from okddip.errors import ConfigError
from okddip.main import build
from okddip.sweeps import teacher

BASE = ("dataset=digits", "dataset.image_size=8", "model=resnet8", "tracking=none")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_HOME / "conf" / group).glob("*.yaml"))


GROUPS = {
    "method": [
        "okddip",
        "baseline",
        "independent",
        "kd",
        "dml",
        "cl_ilr",
        "one",
        "kdcl",
        "ffl",
        "pcl",
        "nope",
        "''",
    ],
    # the large ones take seconds each; they are all in test_combinations.py
    "model": ["resnet8", "resnet14", "resnet20", "densenet40_12", "vgg16", "resnet18", "torchvision", "nope"],
    "dataset": ["digits", "image_folder", "imagenet"],  # the others would be downloaded
    "optimizer": [*options("optimizer")],
    "scheduler": [*options("scheduler"), "[constant,cosine]"],
    "trainer": ["default"],
    "tracking": ["none"],
    "ablation": [*options("ablation")],
    "experiment": ["quickstart"],
    "task": [*options("task")],
}
# Keys of the groups' options, and what a user may type after them
KEYS = [
    *("seed", "method.peers", "method.structure", "method.temperature", "method.alpha", "method.ramp_epochs"),
    *("method.ramp_start", "method.loss", "method.leader", "method.attention", "method.include_self"),
    *("method.detach_targets", "method.aggregate", "method.projection_factor", "method.rescale"),
    *("method.target", "method.teacher", "method.teacher_model", "methods.ramp_epochs", "methods.teacher"),
    *("methods.teacher_model", "model.depth", "model.block", "model.inner_width", "model.dropout"),
    *("model.growth", "model.efficient", "model.name", "model.split", "model.architecture", "dataset.root"),
    *("dataset.name", "dataset.train_size", "dataset.validation", "dataset.image_size", "dataset.mean"),
    *("dataset.std", "dataset.pad", "dataset.flip", "dataset.on_device", "dataset.device_share"),
    *("dataset.cache_dir", "dataset.workers", "dataset.bad_images", "dataset.resize", "optimizer.lr"),
    *("dataset.source.channels", "dataset.source.image_size", "optimizer.momentum", "optimizer.nesterov"),
    *("optimizer.weight_decay", "optimizer.betas", "optimizer.fused", "scheduler.milestones"),
    *("scheduler.gamma", "scheduler.warmup_epochs", "trainer.epochs", "trainer.batch_size"),
    *("trainer.eval_batch_size", "trainer.eval_every", "trainer.limit_batches", "trainer.device"),
    *("trainer.precision", "trainer.channels_last", "trainer.compile", "trainer.compile_mode"),
    *("trainer.fused", "trainer.tf32", "trainer.cudnn_benchmark", "trainer.gradient_clip"),
    *("trainer.resume", "trainer.rerun", "name", "options.method", "options.model", "options.dataset"),
    # whole groups and parts of them, where a value makes no sense
    *("method", "model", "dataset", "optimizer", "scheduler", "trainer", "methods", "dataset.source"),
    *("method._target_", "model._target_", "optimizer._target_", "optimizer._partial_", "task._target_"),
]
VALUES = [
    *("null", "true", "false", "-1", "0", "1", "2", "3", "4", "16", "0.5", "1.5", "-0.1", "1e30", "1e-9"),
    *("1e-400", "1e400", "-0.0", "300", "100000", "10000000000", "99999999999999999999", str(10**40)),
    *("-9223372036854775809", "1" + 400 * "0", ".inf", "-.inf", "inf", ".nan", "nan", "abc", "''", "' '"),
    *("ünï", "猫", "'a b'", "a/b", "..", "/", "~", "/dev/null", "'%s'", "'{}'", "[]", "[1]", "[1,2]"),
    *("[8,8]", "[1e30,1]"),
    *("[0.5,0.75]", "[0.5]", "[.nan]", "[[1]]", "[a]", "[null]", "[true]", "[1e30]", "{}", "{a:1}", "{a:{}}"),
    *("auto", "cpu", "meta", "cuda", "cuda:99", "branch", "network", "kl", "ce", "logits", "bf16", "basic"),
    *("bottleneck", "pairwise", "resnet8", "resnet18", "layer3", "default", "${seed}", "${nobody}", "${}"),
    *("${oc.env:NOBODY}", "${method.peers}", "???", "runs:/1234", "torch.optim.Adam", "torch.nope", "os"),
]


def assigned(drawn: tuple[str, str]) -> str:
    key, value = drawn
    return f"{key}={value}"


CHOICES = st.sampled_from(sorted(GROUPS)).flatmap(
    lambda group: st.tuples(st.just(group), st.sampled_from(GROUPS[group])).map(assigned)
)
CHANGES = st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)).map(assigned)
DELETIONS = st.sampled_from(KEYS).map("~{}".format)
NEW_KEYS = [
    "foo",
    "method.foo",
    "model.foo",
    "optimizer.foo",
    "dataset.foo",
    "dataset.source.foo",
    "trainer.foo",
]
ADDITIONS = st.tuples(st.sampled_from(NEW_KEYS), st.sampled_from(VALUES)).map(assigned).map("+{}".format)
overrides = st.tuples(
    st.lists(CHOICES, max_size=3, unique_by=lambda choice: choice.partition("=")[0]),
    st.lists(CHANGES, max_size=3),
    st.lists(st.one_of(DELETIONS, ADDITIONS), max_size=1),
).map(lambda drawn: [override for part in drawn for override in part])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the digits once, and train no teacher."""
    small = sources.digits(8)

    def digits(image_size: Any = 8) -> sources.Source:
        return small if image_size in (8, [8, 8]) else sources_digits(image_size)

    def provide(*_: Any) -> str:
        raise ConfigError("a teacher would be trained")

    sources_digits = sources.digits
    monkeypatch.setattr(sources, "digits", digits)
    monkeypatch.setattr(teacher, "provide_teacher", provide)


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
    try:
        check_choices(drawn)
        config = configured(*BASE, *drawn)
    except HydraException:
        return  # no such key or option; Hydra says so
    try:
        check(config)
        build(config)
    except ConfigError:
        pass  # any other error fails the test
