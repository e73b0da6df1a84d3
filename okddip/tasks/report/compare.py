"""Groups of runs that differ in nothing but the seed: means, and differences to the baseline."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from okddip.tasks.report import runs
from okddip.tasks.report.columns import (
    PEER_SETTINGS,
    changed_settings,
    reference_settings,
    round_long_numbers,
    settings_column,
    varying_settings,
)
from okddip.tasks.report.costs import Cost, cost_of, predictor_of
from okddip.tasks.report.intervals import Difference, best_of, mean_difference
from okddip.tasks.report.measured import Measured, measured_for
from okddip.tasks.report.published import Published, published_for

if TYPE_CHECKING:
    from mlflow.entities import Run

# the order of rows
METHODS = ("baseline", "independent", "kd", "dml", "cl_ilr", "one", "okddip", "kdcl", "ffl", "pcl")
# what a reader asks for first of the settings that do not vary
COMMON_SETTINGS = {
    "model": "model",
    "method.peers": "peers",
    "method.structure": "structure",
    "trainer.epochs": "epochs",
    "dataset.train_size": "train_size",
}
SETTINGS_COLUMN = "settings"  # one column where several settings of the method vary, as ablations do
SCORES = {"last": "final/top1", "best": "best/top1"}
ENSEMBLE = "test/ensemble/top1"  # after the last epoch
# values of these differ for reasons of their own: the best is looked for among rows that have the same
APART = ("model", "dataset.train_size", "trainer.epochs")


@dataclass
class Group:
    """Runs with the same settings, one for each seed."""

    values: dict[str, str]  # of the table's columns
    settings: dict[str, str]
    runs: list["Run"]
    scores: pd.DataFrame  # index seed; columns `last`, `best` and `ensemble` (may be NaN): top-1 in percent
    differences: dict[str, Difference]  # by score; empty: there is no baseline, or this is it
    predictor: str  # whose accuracy `last` and `best` are
    cost: Cost
    published: list[Published]
    measured: Measured | None  # with this program, by its authors

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

    def best(self, column: str) -> list[bool]:
        """Which groups have the best mean of a column of scores, or one within its interval.

        Among those of the same model, training images and epochs.
        """
        places: dict[tuple[str, ...], list[int]] = {}
        for place, group in enumerate(self.groups):
            places.setdefault(tuple(group.settings.get(key, "") for key in APART), []).append(place)
        found = {
            those[index]
            for those in places.values()
            for index in best_of([self.groups[place].scores[column] for place in those])
        }
        return [place in found for place in range(len(self.groups))]

    def label(self, group: Group) -> str:
        """What tells a group from the others of its model: its method, and what varies within that."""
        same_method = [
            other
            for other in self.groups
            if other.method == group.method and other.settings.get("model") == group.settings.get("model")
        ]
        varying = [name for name in self.columns if len({other.values[name] for other in same_method}) > 1]
        without = [name for name in varying if name != "structure"]  # which the name of an ablation may say
        if len({tuple(other.values[name] for name in without) for other in same_method}) == len(same_method):
            varying = without
        words = [group.method]
        for column in varying:
            if value := self.displayed_values(column)[group.values[column]]:
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
    if merged := settings_column(settings, differing, inner):
        column, named = merged
        displayed = displayed.drop(columns=[columns[key] for key in inner])
        displayed[SETTINGS_COLUMN] = column
    groups = []
    for values, rows in displayed.groupby(list(displayed.columns)):
        by_seed = {int(runs.seed(chosen[row])): chosen[row] for row in rows.index}  # the newest of each
        newest = [by_seed[seed] for seed in sorted(by_seed)]
        scores = pd.DataFrame(
            {
                name: results.reindex(columns=[metric])[metric][
                    [run.info.run_id for run in newest]
                ].to_numpy()
                for name, metric in (SCORES | {"ensemble": ENSEMBLE}).items()
            },
            index=sorted(by_seed),
        )
        own = by_run[rows.index[0]]
        groups.append(
            Group(
                values=dict(zip(displayed.columns, values, strict=True)),
                settings=own,
                runs=newest,
                scores=scores,
                differences={},
                predictor=predictor_of(newest),
                cost=cost_of(newest),
                published=published_for(own),
                measured=measured_for(newest),
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
