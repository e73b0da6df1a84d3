import math

import pytest

from okddip.errors import ConfigError
from okddip.training.schedules import constant, cosine, multistep


def test_the_papers_rate_drops_at_epochs_150_and_225() -> None:
    factor = multistep(milestones=[150, 225], gamma=0.1, warmup_epochs=0, epochs=300)
    assert [factor(epoch) for epoch in (0, 149, 150, 224, 225, 299)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_milestones_below_one_are_fractions_of_the_run() -> None:
    by_fraction = multistep(milestones=[0.5, 0.75], gamma=0.1, warmup_epochs=0, epochs=40)
    by_epoch = multistep(milestones=[20, 30], gamma=0.1, warmup_epochs=0, epochs=40)
    assert [by_fraction(epoch) for epoch in range(40)] == [by_epoch(epoch) for epoch in range(40)]


def test_fractions_of_a_very_short_run_may_fall_together() -> None:
    factor = multistep(milestones=[0.5, 0.75], gamma=0.1, warmup_epochs=0, epochs=3)
    assert [factor(epoch) for epoch in range(3)] == pytest.approx([1, 1, 0.01])


def test_cosine_falls_from_one_towards_zero() -> None:
    factor = cosine(warmup_epochs=0, epochs=10)
    assert [factor(epoch) for epoch in range(10)] == pytest.approx(
        [(1 + math.cos(math.pi * epoch / 10)) / 2 for epoch in range(10)]
    )


@pytest.mark.parametrize("warmup", [4, 0.2])
def test_warmup_rises_in_equal_steps_and_ends_at_the_schedule(warmup: float) -> None:
    factor = constant(warmup_epochs=warmup, epochs=20)
    assert [factor(epoch) for epoch in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert cosine(warmup_epochs=warmup, epochs=20)(4) == pytest.approx(1)


@pytest.mark.parametrize(
    "milestones", [[225, 150], [150, 150], [0], [-1], ["soon"], 150, [0.75, 0.5], [0.5, 4]]
)
def test_milestones_that_do_not_ascend_are_refused(milestones: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.milestones"):
        multistep(milestones=milestones, gamma=0.1, warmup_epochs=0, epochs=10)


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.warmup_epochs=10"):
        constant(warmup_epochs=10, epochs=10)
