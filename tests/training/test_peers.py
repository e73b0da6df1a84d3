"""What the optimizer gets of a group and its method."""

from collections.abc import Callable

import pytest

from okddip.errors import ConfigError
from okddip.run.parts import Parts

BuildParts = Callable[..., Parts]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_fusion_module_alone_has_its_own_weight_decay(
    synthetic_parts: BuildParts, optimizer: str
) -> None:
    built = synthetic_parts("method=ffl", "model=resnet8", f"optimizer={optimizer}")
    peers, fusion = built.optimizer.param_groups
    assert {id(x) for x in peers["params"]} == {id(x) for x in built.group.parameters()}
    assert {id(x) for x in fusion["params"]} == {id(x) for x in built.method.fusion.parameters()}
    assert fusion["weight_decay"] == 1e-5
    assert peers["weight_decay"] == built.optimizer.defaults["weight_decay"] > 1e-5


def test_a_weight_decay_of_what_a_method_does_not_learn_is_refused(synthetic_parts: BuildParts) -> None:
    with pytest.raises(ConfigError, match=r"method.weight_decay=0.1: is for what the method itself learns"):
        synthetic_parts("method=kdcl", "+method.weight_decay=0.1", "model=resnet8")


@pytest.mark.parametrize(
    "overrides", [["method=ffl", "method.weight_decay=null"], ["method=okddip"], ["method=pcl"]]
)
def test_whatever_else_methods_learn_decays_as_the_peers_do(
    synthetic_parts: BuildParts, overrides: list[str]
) -> None:
    built = synthetic_parts(*overrides, "model=resnet8")
    [everything] = built.optimizer.param_groups
    learned = [*built.group.parameters(), *built.method.parameters()]
    assert [id(x) for x in everything["params"]] == [id(x) for x in learned]
    assert everything["weight_decay"] == 5e-4
