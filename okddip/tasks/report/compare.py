"""Groups of runs that differ in nothing but the seed: means, and differences to the baseline."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from okddip.tasks.report import runs
from okddip.tasks.report.published import Published, ablations, option, published_for

if TYPE_CHECKING:
    from mlflow.entities import Run

METHODS = ("baseline", "independent", "kd", "dml", "cl_ilr", "one", "okddip")  # the order of rows
# what a reader asks for first of the settings that do not vary
COMMON_SETTINGS = {
    "model": "model",
    "method.peers": "peers",
    "method.structure": "structure",
    "trainer.epochs": "epochs",
    "dataset.train_size": "train_size",
}
PEER_SETTINGS = ("method.peers", "method.structure")
ROUNDING_ERROR = 1e-9  # percent; a smaller spread is none
LONG_NUMBER = re.compile(r"(?=.{8})-?\d+\.\d+(e-?\d+)?")
SETTINGS_COLUMN = "settings"  # one column where several settings of the method vary, as ablations do
SCORES = {"last": "final/top1", "best": "best/top1"}


class Difference(NamedTuple):
    """Mean of ours less theirs, with its 95% interval (NaN if the runs do not give one)."""

    mean: float
    low: float
    high: float
    pairs: int  # of runs with the same seed; 0: not paired


@dataclass
class Group:
    """Runs with the same settings, one for each seed."""

    values: dict[str, str]  # of the table's columns
    settings: dict[str, str]
    runs: list["Run"]
    scores: pd.DataFrame  # index seed; columns `last` and `best`: top-1 in percent
    differences: dict[str, Difference]  # by score; empty: there is no baseline, or this is it
    published: list[Published]

    @property
    def method(self) -> str:
        return self.settings["method"]


@dataclass
class Comparison:
    """The runs on one data set: a table."""

    dataset: str
    columns: list[str]  # short names of the settings that vary
    common: dict[str, str]  # settings that do not, of `COMMON_SETTINGS`
    groups: list[Group]
    reference: str  # what differences are to: "baseline", "default" or, where there are none, ""
    named: dict[str, str]  # what the names in the column `SETTINGS_COLUMN` stand for
    held_out: str  # of which runs the best epoch was chosen by images held out of training: all, some, none
    repeated: int  # runs left out, as a newer one has the same settings and seed

    def displayed_values(self, column: str) -> dict[str, str]:
        """The values of a column as the table displays them."""
        values = pd.Series([group.values[column] for group in self.groups])
        return dict(zip(values, round_long_numbers(values), strict=True))

    def label(self, group: Group) -> str:
        """What tells a group from the others of its model: its method, and what varies within that."""
        same_method = [
            other
            for other in self.groups
            if other.method == group.method and other.settings.get("model") == group.settings.get("model")
        ]
        words = [group.method]
        for column in self.columns:
            value = self.displayed_values(column)[group.values[column]]
            if len({other.values[column] for other in same_method}) > 1 and value:
                plain = {"peers": f"{value} peers", SETTINGS_COLUMN: value, "structure": value}
                words.append(plain.get(column, f"{column} {value}"))
        return ", ".join(words)


def compare(chosen: Sequence["Run"]) -> list[Comparison]:
    """A comparison for each data set."""
    return [compare_dataset(name, members) for name, members in sorted(runs.group_by_dataset(chosen).items())]


def compare_dataset(dataset: str, chosen: Sequence["Run"]) -> Comparison:
    """Group runs on one data set, oldest first, by whatever varies among them."""
    by_run = runs.settings_with_teachers(chosen)
    results = runs.table(chosen)
    settings = pd.DataFrame(by_run).fillna("")
    columns = varying_settings(settings)
    displayed = settings[list(columns)].rename(columns=columns)
    # targets of Hydra are import paths: their last part is the name
    displayed = displayed.map(
        lambda value: value.rpartition(".")[2] if value.startswith("okddip.") else value
    )
    of_method = [key for key in columns if key.startswith("method.")]
    usual = {method: reference_settings(rows) for method, rows in settings.groupby("method")}
    differing = [changed_settings(row, usual[row["method"]], of_method) for _, row in settings.iterrows()]
    inner = [key for key in of_method if key not in PEER_SETTINGS]
    named: dict[str, str] = {}
    if len(inner) > 1:
        names = [ablation_name(row["method"], differing[index]) for index, row in settings.iterrows()]
        texts = [as_text(changes, inner) for changes in differing]
        named = {name: text for name, text in zip(names, texts, strict=True) if name and text}
        displayed = displayed.drop(columns=[columns[key] for key in inner])
        displayed[SETTINGS_COLUMN] = [name or text for name, text in zip(names, texts, strict=True)]
    groups = []
    for values, rows in displayed.groupby(list(displayed.columns)):
        by_seed = {int(runs.seed(chosen[row])): chosen[row] for row in rows.index}  # the newest of each
        newest = [by_seed[seed] for seed in sorted(by_seed)]
        scores = pd.DataFrame(
            {
                name: results.loc[[run.info.run_id for run in newest], metric].to_numpy()
                for name, metric in SCORES.items()
            },
            index=sorted(by_seed),
        )
        own = by_run[rows.index[0]]
        groups.append(
            Group(
                dict(zip(displayed.columns, values, strict=True)), own, newest, scores, {}, published_for(own)
            )
        )
    repeated = len(chosen) - sum(len(group.runs) for group in groups)
    groups.sort(key=sort_key)
    beside_method = [
        name for key, name in columns.items() if not key.startswith("method.") and name != "method"
    ]
    plain = {
        "baseline": [group for group in groups if group.method == "baseline"],
        "default": [
            group for group in groups if not changed_settings(group.settings, usual[group.method], of_method)
        ],
    }
    reference = next((name for name, members in plain.items() if 0 < len(members) < len(groups)), "")
    references = plain.get(reference, [])
    for group in groups:
        for other in references:
            same = all(other.values[name] == group.values[name] for name in beside_method)
            same = same and (reference == "baseline" or other.method == group.method)
            if same and all(group is not known for known in references):
                group.differences = {
                    name: mean_difference(group.scores[name], other.scores[name]) for name in SCORES
                }
    common = {
        name: str(settings[key].iloc[0])
        for key, name in COMMON_SETTINGS.items()
        if key in settings and settings[key].nunique() == 1
    }
    held_out = pd.to_numeric(settings.get("dataset.validation", pd.Series("0")), "coerce") > 0
    if not any(group.differences for group in groups):
        reference = ""
    return Comparison(
        dataset,
        list(displayed.columns),
        common,
        groups,
        reference,
        named,
        "all" if held_out.all() else "some" if held_out.any() else "none",
        repeated,
    )


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


def sort_key(group: Group) -> list[tuple[int, float, str]]:
    """By model, then method from the plainest on, then the other columns; numbers by size."""
    values = dict(group.values)
    method = values.pop("method")
    rank = METHODS.index(method) if method in METHODS else len(METHODS)
    keys: list[tuple[int, float, str]] = [(0, rank, method)]
    if "model" in values:
        keys.insert(0, (0, 0.0, values.pop("model")))
    for value in values.values():
        try:
            keys.append((0, float(value), ""))
        except ValueError:
            keys.append((1, 0.0, value))
    return keys


def mean_difference(ours: pd.Series, theirs: pd.Series) -> Difference:
    """Mean difference with its 95% interval, from Student's t.

    Over the pairs of runs with the same seed if there are at least two, otherwise Welch's for two samples; of
    a single run, and of two without a seed in common, there is no interval.
    There is none if nothing varies: accuracies on few images are often equal, and that is no certainty.

    Args:
        ours, theirs: scores; the index is the seed.
    """
    paired = (ours - theirs).dropna()  # aligned by seed
    if len(paired) >= 2:
        mean, pairs = paired.mean(), len(paired)
        error, freedom = paired.sem(), float(pairs - 1)
    else:
        mean, pairs = ours.mean() - theirs.mean(), 0
        squares = np.array([ours.sem() ** 2, theirs.sem() ** 2])  # NaN for a single run
        error = np.sqrt(squares.sum())
        sizes = np.array([len(ours), len(theirs)])
        with np.errstate(divide="ignore", invalid="ignore"):
            freedom = float(squares.sum() ** 2 / (squares**2 / (sizes - 1)).sum())
        if len(paired) == 1 and sizes.min() == 1:
            mean, pairs = paired.mean(), 1
    half = float(stats.t.ppf(0.975, freedom) * error) if error > ROUNDING_ERROR else np.nan
    return Difference(float(mean), float(mean - half), float(mean + half), pairs)
