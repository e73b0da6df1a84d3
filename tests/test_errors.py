"""Numbers that are allowed, and others."""

from typing import Any

import pytest

from okddip.errors import ConfigError, check_number


@pytest.mark.parametrize("value", [0, 7, -3, 0.5, 2**63 - 1, -(2**63) + 1, 1e300])
def test_a_number_that_a_machine_holds_passes(value: float) -> None:
    check_number("key", value)


@pytest.mark.parametrize(
    "value", [True, "1", None, [1], float("nan"), float("inf"), -float("inf"), 2**63, 10**30, -(10**400)]
)
def test_anything_else_is_refused(value: Any) -> None:
    for integer in (True, False):
        with pytest.raises(ConfigError, match=r"^key=.*: must be a"):
            check_number("key", value, integer=integer)


def test_the_message_says_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"^key=0\.5: must be a whole number at least 1 and less than 9\.$"):
        check_number("key", 0.5, minimum=1, below=9, integer=True)
    with pytest.raises(
        ConfigError, match=r"^key=9223372036854775808: .* at least 1 and at most 9\.22337e\+18"
    ):
        check_number("key", 2**63, minimum=1, integer=True)
