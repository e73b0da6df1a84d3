"""The small version of `kills.py`: one kill in each phase."""

from pathlib import Path

import kills
import pytest


@pytest.mark.slow
def test_a_kill_in_each_phase_costs_nothing(tmp_path: Path) -> None:
    counts = kills.run(len(kills.PHASES), tmp_path / "kills")
    assert {name: count["lost"] for name, count in counts.items()} == {name: [] for name in kills.PHASES}
    assert [count["survived"] for count in counts.values()] == [1] * len(kills.PHASES)
