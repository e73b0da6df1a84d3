"""How timings are summed up."""

from okddip.tasks.benchmark.timing import quartiles


def test_speeds_are_reported_as_median_and_quartiles() -> None:
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert quartiles([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}
