"""Errors a user can cause. Hydra prints them without a stack of frames and exits with code 1."""

import math
from collections.abc import Collection, Sequence
from typing import Any

from hydra.errors import CompactHydraException

from okddip.text import for_terminal

MOST_NAMED = 20  # of several things that are wrong, how many a message names
LARGEST = 2**63 - 1  # whole number that PyTorch, MLflow and NumPy take


class ConfigError(CompactHydraException, ValueError):
    """A setting, a file or a folder that cannot be used; the message names it and says what to do.

    What it quotes may be anybody's text: lines after the first are indented, so that none of them passes for
    a message of its own, and what would command a terminal is escaped.
    """

    def __str__(self) -> str:
        return for_terminal(super().__str__(), lines=True).replace("\n", "\n  ")


class Incompatible(ConfigError):
    """Settings each of which is fine, and which make no sense together: a sweep passes over them."""


def raise_problems(where: str, problems: Sequence[str]) -> None:
    """Refuse what is wrong, all at once: one start is enough to learn of everything that has to be mended.

    Args:
        where: what the problems have in common.
        problems: a sentence for each, which is the message where there is only one.

    Raises:
        ConfigError: there are any; names the first `MOST_NAMED`, and says how many there are.
    """
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        rest = f", of which the first {MOST_NAMED} are" if len(problems) > MOST_NAMED else ""
        raise ConfigError(
            "\n".join([f"{where}: {len(problems):,} things are wrong{rest}:", *problems[:MOST_NAMED]])
        )


def check_number(
    key: str,
    value: Any,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    integer: bool = False,
) -> None:
    """Refuse a value that is no finite number that a machine holds, or lies outside the stated bounds.

    Raises:
        ConfigError: names `key`, the value found and what is allowed.
    """
    bounds = [
        (minimum, "at least", lambda bound: value >= bound),
        (above, "greater than", lambda bound: value > bound),
        (maximum, "at most", lambda bound: value <= bound),
        (below, "less than", lambda bound: value < bound),
    ]
    is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    if not integer:
        is_number = is_number or (isinstance(value, float) and math.isfinite(value))
    if is_number and all(holds(bound) for bound, _, holds in bounds if bound is not None):
        return
    if isinstance(value, int) and value > LARGEST:
        bounds.append((LARGEST, "at most", lambda bound: value <= bound))
    if minimum is not None and minimum == maximum:
        raise ConfigError(f"{key}={value}: must be {minimum:g}.")
    limits = " and ".join(f"{words} {bound:g}" for bound, words, _ in bounds if bound is not None)
    noun = "a whole number" if integer else "a number"
    raise ConfigError(f"{key}={value}: must be {noun} {limits}".rstrip() + ".")


def check_choice(key: str, value: Any, choices: Collection[Any]) -> None:
    """Refuse a value that is not one of `choices`.

    Raises:
        ConfigError: names `key`, the value found and what is allowed.
    """
    # `True == 1`: a choice is compared with its type
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise ConfigError(f"{key}={value}: must be one of {', '.join(map(str, choices))}.")
