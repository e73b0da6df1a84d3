"""Which runs are compared: found in a store, and finished."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from okddip.errors import ConfigError
from okddip.older_versions import LATER_SETTINGS, first_epoch
from okddip.run.identity import FOLDER_DATASETS, IGNORED_DATASET_SETTINGS, IGNORED_SETTINGS
from okddip.run.summary import PARAMETERS
from okddip.sweeps.environment import is_teacher
from okddip.sweeps.outcomes import finished_before
from okddip.text import NUMBER, for_terminal
from okddip.tracking.params import CONTEXT, digests_of, flatten, params_of
from okddip.training.precision import auto_precision

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

PAGE_SIZE = 1000  # runs that the store sends at once
REQUIRED_PARAMS = {"method", "seed", "trainer.epochs"}  # params of a training run
TEACHER = "method.teacher"  # the param: where it is
LENGTHS = "lengths"  # tag of a run that an older version lengthened against its schedule
CONSTANTS = {"null": None, "true": True, "false": False}  # as params have them
BEST_EPOCH = "best/epoch"  # a metric in older runs; now a tag, which MLflow draws no bar of
OTHER_KINDS = {"kind", "task"}  # tags of the parents of sweeps, evaluations and benchmarks


def find_runs(
    client: "MlflowClient", uri: str, experiment: str, sweep: str | None = None, where: str | None = None
) -> list["Run"]:
    """`search`, where at least one finished training run is wanted.

    Raises:
        ConfigError: `search` refuses it, or no finished training run matches; says what was searched.
    """
    found, searched, total = search(client, uri, experiment, sweep, where, "report.")
    chosen, left_out = finished_runs(found)
    if not chosen:
        raise ConfigError(
            f"No finished run to report on. Searched {searched}: {len(found)} of the experiment's"
            f" {total} runs match. {left_out}".rstrip()
        )
    return found


def search(
    client: "MlflowClient",
    uri: str,
    experiment: str,
    sweep: str | None = None,
    where: str | None = None,
    prefix: str = "",
) -> tuple[list["Run"], str, int]:
    """Runs of an experiment, or of a sweep in it, that match a filter.

    Args:
        client: of the store.
        uri: of the store, for messages.
        experiment: its name.
        sweep: the name of a sweep or the ID of its parent run.
        where: in MLflow's filter language.
        prefix: of `sweep` and `where` in messages.

    Returns:
        The runs, what was searched in words, and how many runs the experiment has.

    Raises:
        ConfigError: there is no such experiment, or the filter is not understood.
    """
    searched = f"tracking.uri={uri}, tracking.experiment={experiment}"
    known = client.get_experiment_by_name(experiment)
    if known is None:
        names = ", ".join(sorted(each.name for each in client.search_experiments()))
        raise ConfigError(f"{searched}: there is no such experiment. There are {names}.")
    everything = search_runs(client, known.experiment_id)
    found = filter_runs(client, known.experiment_id, everything, where, prefix) if where else everything
    if where:
        searched += f', {prefix}where="{where}"'
    if sweep:
        searched += f", {prefix}sweep={sweep}"
        parents = [
            run
            for run in everything
            if tag(run, "kind") == "sweep" and sweep in (run.info.run_id, tag(run, "sweep"))
        ]
        before = {run_id for parent in parents for run_id in finished_before(parent)}
        found = [
            run
            for run in found
            if (sweep in (tag(run, "sweep"), tag(run, "mlflow.parentRunId")) and not is_teacher(run))
            or run.info.run_id in before
        ]
    return found, searched, len(everything)


def filter_runs(
    client: "MlflowClient", experiment_id: str, everything: Sequence["Run"], where: str, prefix: str = ""
) -> list["Run"]:
    """The runs whose params of now match a filter; MLflow itself knows those that a run began with."""
    from mlflow.entities import Metric, Param, Run, RunData, RunTag
    from mlflow.utils.search_utils import SearchUtils

    matches = {run.info.run_id for run in search_runs(client, experiment_id, where, prefix)}
    for run in everything:
        now = params_of(run)
        if now == run.data.params:
            continue
        data = RunData(
            [Metric(key, value, 0, 0) for key, value in run.data.metrics.items()],
            [Param(key, value) for key, value in now.items()],
            [RunTag(key, value) for key, value in run.data.tags.items()],
        )
        matches.discard(run.info.run_id)
        matches |= {
            match.info.run_id for match in SearchUtils.filter([Run(run.info, data, run.inputs)], where)
        }
    return [run for run in everything if run.info.run_id in matches]


def search_runs(client: "MlflowClient", experiment_id: str, where: str = "", prefix: str = "") -> list["Run"]:
    """All runs that match a filter.

    Raises:
        ConfigError: with MLflow's message if the filter is not understood.
    """
    from mlflow.exceptions import MlflowException

    found: list[Run] = []
    token: str | None = None
    while True:
        try:
            page = client.search_runs([experiment_id], where, max_results=PAGE_SIZE, page_token=token)
        except MlflowException as error:
            if not where or error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            raise ConfigError(
                f"{prefix}where={where}: {error.message} Names that hold a dot or a slash stand in backticks:"
                " params.`method.peers` = '4', metrics.`final/top1` > 90, tags.method = 'okddip'."
            ) from None
        found += page
        token = page.token
        if not token:
            return found


def training_runs(found: Sequence["Run"]) -> list["Run"]:
    """The training runs among `found`, which may hold parents of sweeps, evaluations and others' runs."""
    return [
        run
        for run in found
        if run.data.params.keys() >= REQUIRED_PARAMS and not OTHER_KINDS & run.data.tags.keys()
    ]


def finished_runs(found: Sequence["Run"]) -> tuple[list["Run"], str]:
    """The finished training runs among `found`, oldest first, and sentences on those left out."""
    training = training_runs(found)
    finished = [
        run
        for run in training
        if run.info.status == "FINISHED" and {"final/top1", "best/top1"} <= run.data.metrics.keys()
    ]
    unfinished = Counter(run.info.status for run in training if run not in finished)
    sentences = []
    if unfinished:
        statuses = ", ".join(f"{number} {status}" for status, number in sorted(unfinished.items()))
        sentences.append(f"Unfinished runs, left out: {unfinished.total()} ({statuses}).")
    if lengthened := sum(bool(tag(run, LENGTHS)) for run in finished):
        sentences.append(
            f"Runs that an older version lengthened, left out: {lengthened}; their schedule is that of no one"
            " length."
        )
    compared = [run for run in finished if not tag(run, LENGTHS)]
    return sorted(compared, key=lambda run: run.info.start_time), " ".join(sentences)


def table(chosen: Sequence["Run"]) -> pd.DataFrame:
    """A row for each run, by its ID: its name, how it stands, its settings and the last value of each metric.

    Settings are those of the last time that the run was resumed, named as in MLflow; numbers are numbers.
    """
    rows = [
        {
            "name": for_terminal(run.info.run_name or ""),
            "status": run.info.status,
            "start": pd.to_datetime(run.info.start_time, unit="ms", utc=True),
            "sweep": for_terminal(tag(run, "sweep") or ""),
            "folder": for_terminal(tag(run, "folder") or ""),
            **{key: as_value(text) for key, text in all_params(run).items()},
            **last_values(run),
        }
        for run in chosen
    ]
    return pd.DataFrame(rows, index=pd.Index([run.info.run_id for run in chosen], name="run_id"))


def all_params(run: "Run") -> dict[str, str]:
    """The params of a run, also those that it has not: of settings that came later, and of their first value.

    The option file of a newer method may have another value; without this its runs could not be told apart.
    Which precision `auto` is depends on the device: seeds of several devices are not one row.
    """
    known = flatten(LATER_SETTINGS) | params_of(run)
    if known.get("trainer.precision") == "auto" and (kind := device(run)):
        known["trainer.precision"] = auto_precision(kind)
    return known


def last_values(run: "Run") -> dict[str, float]:
    """The last value of each metric; the best epoch counted from 1."""
    values = dict(run.data.metrics)
    if best := tag(run, BEST_EPOCH.replace("/", ".")):
        values[BEST_EPOCH] = float(best)
    if BEST_EPOCH in values:
        values[BEST_EPOCH] += 1 - first_epoch(run.data.tags)
    return values


def as_value(text: str) -> object:
    """The value that a param stands for; lists and mappings stay text."""
    if text in CONSTANTS:
        return CONSTANTS[text]
    if NUMBER.fullmatch(text):
        return float(text) if set(text) & set(".eE") else int(text)
    return for_terminal(text)


def metric_history(client: "MlflowClient", run: "Run", metric: str) -> pd.Series:
    """All values of a metric of a run, by epoch from 1 on; an older version counted from 0 in MLflow."""
    points = client.get_metric_history(run.info.run_id, metric)
    values = {point.step + 1 - first_epoch(run.data.tags): point.value for point in points}
    return pd.Series(values, name=metric, dtype=float).rename_axis("epoch").sort_index()


def settings(run: "Run") -> dict[str, str]:
    """What may tell one row of a table from another: no seed, no place; and what a teacher is, not where."""
    known = {
        key: value
        for key, value in all_params(run).items()
        if not key.startswith(IGNORED_SETTINGS)
        and not (key.startswith("dataset.") and key.rpartition(".")[2] in IGNORED_DATASET_SETTINGS)
        and key not in ("seed", TEACHER)
    }
    if teacher := tag(run, "teacher"):
        models = [each.rpartition("-")[0] for each in teacher.split(" & ")]
        known |= {TEACHER: teacher, f"{TEACHER}_model": " & ".join(models)}
    return known


def settings_with_teachers(chosen: Sequence["Run"]) -> list[dict[str, str]]:
    """The settings of each run; where students of one seed have several teachers of a kind, with which it is.

    Elsewhere they count as one: each student has the teacher of its own seed, say.
    """
    rows = [settings(run) for run in chosen]
    keys = [tuple(sorted(row.items())) for row in rows]
    teachers: dict[tuple[object, ...], set[tuple[str, str]]] = {}
    epochs: dict[object, set[str]] = {}
    for key, run in zip(keys, chosen, strict=True):
        its_seed, its_epoch = teacher_seed_and_epoch(run)
        teachers.setdefault((key, seed(run)), set()).add((its_seed, its_epoch))
        epochs.setdefault(key, set()).add(its_epoch)
    several = {key for (key, _), those in teachers.items() if len(those) > 1}
    for row, key, run in zip(rows, keys, chosen, strict=True):
        its_seed, its_epoch = teacher_seed_and_epoch(run)
        if key in several:
            words = [row.get(TEACHER, "")]
            words += [f"of seed {its_seed}"] if its_seed != seed(run) else []
            words += [f"epoch {its_epoch}"] if len(epochs[key]) > 1 else []
            row[TEACHER] = " ".join(words).strip()
    return rows


def repeated_runs(chosen: Sequence["Run"]) -> set[str]:
    """The IDs of finished runs that have a newer finished one with the same images, settings and seed."""
    finished, _ = finished_runs(chosen)
    newest: dict[object, str] = {}
    for dataset, members in group_by_dataset(finished).items():
        for run, known in zip(members, settings_with_teachers(members), strict=True):
            newest[dataset, seed(run), frozenset(known.items())] = run.info.run_id
    return {run.info.run_id for run in finished} - set(newest.values())


def teacher_seed_and_epoch(run: "Run") -> tuple[str, str]:
    """Seed and epoch of the teacher of a run; of an older one the place, which stands for both."""
    return (
        tag(run, "teacher.seed") or params_of(run).get(TEACHER, ""),
        tag(run, "teacher.epoch") or "",
    )


def seed(run: "Run") -> str:
    return params_of(run)["seed"]


class DifferentPeer(NamedTuple):
    """One of several networks of different architectures."""

    predictor: str  # as in the names of metrics
    model: str
    parameters: str

    @property
    def name(self) -> str:
        return f"{self.predictor} ({self.model})"


def different_peers(run: "Run") -> list[DifferentPeer]:
    """The peers of a run whose networks differ; else none."""
    models = params_of(run).get("model.peers", "null")
    if not models.startswith("["):
        return []
    sizes = (tag(run, PARAMETERS) or "").strip("[]").split(",")
    peers = []
    for index, model in enumerate(models.strip("[]").split(",")):
        name = f"peer{index}"
        predictor = name if f"test/{name}/top1" in run.data.metrics else "leader"  # which is the last
        size = sizes[index] if index < len(sizes) else ""
        peers.append(DifferentPeer(predictor, model, f"{int(size):,}" if size.isdecimal() else "unknown"))
    return peers


class TestSet(NamedTuple):
    """What a run was tested on."""

    option: str
    size: str  # as configured
    digest: str  # of the images; empty: the store does not say
    place: str  # where they are, as given


def group_by_dataset(chosen: Sequence["Run"]) -> dict[str, list["Run"]]:
    """Runs on the same test images, under the name of their data set.

    Image folders are told apart by their images, wherever they lie. The same images scaled to another size
    are recognised by their place.
    """
    groups: dict[TestSet, list[Run]] = {}
    for run in chosen:
        tested = test_set_of(run)
        same = (known for known in groups if same_test_images(known, tested))
        groups.setdefault(next(same, tested), []).append(run)
    named: dict[str, list[Run]] = {}
    for tested, members in groups.items():
        name = tested.option
        if tested.place:
            name += f" {tested.place}"
        named[f"{name} ({tested.digest[:6]})" if name in named else name] = members
    return named


def test_set_of(run: "Run") -> TestSet:
    known = params_of(run)
    option, root = known.get("dataset", ""), known.get("dataset.root", "")
    place = root if option in FOLDER_DATASETS else ""
    return TestSet(option, known.get("dataset.image_size", ""), digests_of(run).get("test", ""), place)


def same_test_images(one: TestSet, other: TestSet) -> bool:
    if one.option != other.option:
        return False
    if one.digest and other.digest and one.size == other.size:
        return one.digest == other.digest
    return one.place == other.place


def device(run: "Run") -> str:
    """The kind of device that a run was trained on; of jobs side by side, cuda:0 and cuda:1, the same."""
    return for_terminal((tag(run, "device") or "").partition(":")[0])


def train_images(run: "Run") -> int | None:
    """How many training images a run has; None if the store does not say."""
    for used in run.inputs.dataset_inputs if run.inputs else []:
        if any(each.key == CONTEXT and each.value == "train" for each in used.tags):
            try:
                return int(json.loads(used.dataset.profile or "")["num_rows"])
            except (TypeError, ValueError, KeyError):  # anybody may have written it
                return None
    return None


def tag(run: "Run", name: str) -> str | None:
    return run.data.tags.get(name)
