"""Which settings tell the rows of a table apart, and what they are called there."""

import re
from collections.abc import Mapping, Sequence

import pandas as pd

from okddip.tasks.report import runs
from okddip.tasks.report.published import ablations, option

PEER_SETTINGS = ("method.peers", "method.structure")
NETWORKS = {"method.structure": "network"}
LONG_NUMBER = re.compile(r"(?=.{8})-?\d+\.\d+(e-?\d+)?")


def round_long_numbers(column: pd.Series) -> pd.Series:
    """Values of a setting with four digits where they have more than seven, if that leaves them apart."""
    short = column.map(lambda value: f"{float(value):.4g}" if LONG_NUMBER.fullmatch(value) else value)
    return short if short.nunique() == column.nunique() else column


def reference_settings(rows: pd.DataFrame) -> dict[str, str]:
    """What a method's runs are compared with: its option file, and where no run has that, what most have."""
    usual = dict(option("method", rows["method"].iloc[0]))
    for key in usual.keys() & set(rows.columns):
        found = rows[key].value_counts(normalize=True)
        if usual[key] not in found and found.iloc[0] > 0.5:
            usual[key] = str(found.index[0])
    return usual


def changed_settings(
    settings: Mapping[str, str] | pd.Series, usual: Mapping[str, str], keys: Sequence[str]
) -> dict[str, str]:
    """The settings among `keys` that are not the usual ones."""
    return {key: settings[key] for key in keys if settings.get(key, "") not in ("", usual.get(key))}


def as_text(changes: Mapping[str, str], keys: Sequence[str]) -> str:
    return " ".join(f"{key.removeprefix('method.')}={changes[key]}" for key in keys if key in changes)


def ablation_name(method: str, changes: Mapping[str, str]) -> str:
    """The name of the option of the group `ablation` that makes these changes; empty if there is none.

    Peers have a column of their own.
    """
    if method != "okddip":
        return ""
    changes = {key: value for key, value in changes.items() if key != "method.peers"}
    return next((name for name, its in ablations().items() if its == changes), "")


def settings_column(
    settings: pd.DataFrame, differing: Sequence[Mapping[str, str]], keys: Sequence[str]
) -> tuple[list[str], dict[str, str]] | None:
    """One column in the place of several settings of the methods: the ablation, and what else differs.

    Args:
        settings: a row for each run.
        differing: what each run has that its method has not usually.
        keys: of the settings.

    Returns:
        The column, and what the names in it stand for. None if a single setting stays a column of its own:
        one whose values are not all those of ablations.
    """
    found = [named_changes(*each) for each in zip(settings["method"], differing, strict=True)]
    texts = [as_text(rest, keys) for _, rest in found]
    ablated = any(name not in ("", "full") for name, _ in found)
    if not keys or (len(keys) == 1 and (any(texts) or not ablated)):
        return None
    column, named = [], {}
    for (name, rest), text, changes in zip(found, texts, differing, strict=True):
        shown = "" if name == "full" and text and not ablated else name
        column.append(f"{shown} {text}".strip())
        if stands_for := as_text({key: value for key, value in changes.items() if key not in rest}, keys):
            named[name] = stands_for
    return column, named


def named_changes(method: str, changes: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The ablation among the changes to a method's settings, and the other changes.

    Two ablations at once have no name; but peers and the structure have columns of their own, so `networks`
    beside another is none.
    """
    if method != "okddip":
        return "", dict(changes)
    if name := ablation_name(method, changes):
        return name, {}
    within = [name for name, its in ablations().items() if its and its.items() <= changes.items()]
    if len(within) > 1:
        within = [name for name in within if ablations()[name] != NETWORKS]
    if len(within) > 1:
        return "", dict(changes)
    name = within[0] if within else "full"
    return name, {key: value for key, value in changes.items() if key not in ablations()[name]}


def varying_settings(settings: pd.DataFrame) -> dict[str, str]:
    """The settings that vary, and short names for them; the method always.

    A setting of a group counts if it varies among runs with the same option of that group: that methods
    have other settings than one another is no news. Peers and structure count in any case; and a setting that
    some runs have and others have not, where nothing else tells them apart.
    """
    keys = ["method"]
    others: list[str] = []
    for key in sorted(settings.columns, key=lambda key: key.count(".")):
        part = key.partition(".")[0]
        option = next((name for name in (part, f"{part}._target_") if name in settings), None)
        if key == "method" or (key.endswith("._target_") and key != option):
            continue
        if key == option or option is None or key in PEER_SETTINGS:
            varies = settings[key].nunique() > 1
        else:
            present = settings[settings[key] != ""]
            varies = bool((present.groupby(option)[key].nunique() > 1).any())
        # an interpolated setting repeats the one that it refers to; a teacher often follows from the others
        if not varies or key == runs.TEACHER:
            others.append(key)
        elif not any(settings[key].equals(settings[known]) for known in keys):
            keys.append(key)
    for key in others:
        if (settings.groupby(keys)[key].nunique() > 1).any():
            keys.append(key)
    if runs.TEACHER in keys:  # which names the model
        keys = [key for key in keys if key != f"{runs.TEACHER}_model"]
    return short_names(keys)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or as many parts as tell it from the others."""
    names = {}
    for key in keys:
        parts = key.removesuffix("._target_").split(".")
        endings = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        others = [other.removesuffix("._target_") for other in keys if other != key]
        names[key] = next(
            (end for end in endings if not any(f".{other}".endswith(f".{end}") for other in others)), key
        )
    return names
