"""Published figures, each with its source, and with what is otherwise there."""

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import OmegaConf

from okddip.assembly import CONFIG_HOME
from okddip.tracking.params import flatten

HERE = Path(__file__).parent
# what the source says and not the option file, what follows from the length of the run, and the teacher
NOT_BY_DEFAULT = (
    *("method._target_", "method.peers", "method.structure", "method.ramp_epochs"),
    *("method.teacher", "method.teacher_model"),
)
LIMIT = "trainer.limit_batches"


class Published(NamedTuple):
    top1: str  # percent, with the digits of the source
    std: str  # empty: not stated
    runs: str  # empty: not stated
    source: str
    marks: tuple[str, ...]  # what is otherwise there than in the runs beside it

    @property
    def value(self) -> str:
        return self.top1 + (f" ± {self.std}" if self.std else "") + ("*" if self.marks else "")

    @property
    def provenance(self) -> str:
        return "; ".join((self.source + (f", n = {self.runs}" if self.runs else ""), *self.marks))

    def __str__(self) -> str:
        return f"{self.value} [{self.provenance}]"


def published_for(settings: Mapping[str, str]) -> list[Published]:
    """Published figures of a run's data set, model and method; of these those nearest to its settings."""
    found = [
        Published(row["top1"], row["std"], row["runs"], row["source"], marks(row, settings))
        for row in read("published_results.csv")
        if all(row[name] == settings.get(name) for name in ("dataset", "model", "method"))
    ]
    fewest = min((len(figure.marks) for figure in found), default=0)
    return [figure for figure in found if len(figure.marks) == fewest]


def marks(row: Mapping[str, str], settings: Mapping[str, str]) -> tuple[str, ...]:
    """What is otherwise in a published figure than in a run: peers, structure, method settings, images."""
    different = []
    if row["peers"] != settings["method.peers"]:
        different.append(f"{row['peers']} peers")
    if not row["structure"]:
        different.append("structure not stated")
    elif row["structure"] != settings["method.structure"]:
        different.append(row["structure"])
    different += [
        f"{key.removeprefix('method.')}={value}"
        for key, value in defaults(row["method"]).items()
        if settings.get(key, value) != value
    ]
    if settings.get("dataset.train_size", "null") != "null" or float(settings.get("dataset.validation", "0")):
        different.append("all training images")
    if settings.get(LIMIT, "null") != "null":
        different.append("whole epochs, all test images")
    return tuple(different)


def source_text(source: str) -> str:
    return next(row["text"] for row in read("published_sources.csv") if row["source"] == source)


@cache
def read(file: str) -> list[dict[str, str]]:
    with (HERE / file).open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def defaults(method: str) -> dict[str, str]:
    """The settings of a method's option file that a published figure was made with."""
    return {key: value for key, value in option("method", method).items() if key not in NOT_BY_DEFAULT}


@cache
def option(group: str, name: str) -> dict[str, str]:
    """The settings in an option file that begin with `method.`; none for a user's own.

    Those of the methods are those of the authors' code.
    """
    path = CONFIG_HOME / "conf" / group / f"{name}.yaml"
    if not path.is_file() or Path(name).name != name:  # it comes from the store
        return {}
    content: Any = OmegaConf.load(path)
    if group == "method":
        shared = OmegaConf.select(OmegaConf.load(CONFIG_HOME / "conf" / "config.yaml"), "methods")
        content = OmegaConf.create({"methods": shared, "method": content})
    flat = flatten(cast(dict[str, object], OmegaConf.to_container(content, resolve=True)))
    return {key: value for key, value in flat.items() if key.startswith("method.")}


@cache
def ablations() -> dict[str, dict[str, str]]:
    """What each option of the group `ablation` changes; `full` nothing."""
    names = sorted(path.stem for path in (CONFIG_HOME / "conf" / "ablation").glob("*.yaml"))
    return {name: option("ablation", name) for name in names}
