"""What others wrote into a store acts in no output: terminal, tables, figures, descriptions, commands."""

import os
import re
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import matplotlib.text
import pandas as pd
import pytest
from conftest import Answer
from matplotlib.figure import Figure
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient
from report_store import configuration

from okddip.errors import ConfigError
from okddip.run.summary import run_params
from okddip.tasks.report import make, runs
from okddip.tasks.report.reproduce import reproducing_command
from okddip.tracking.tracker import MLflow
from okddip.trust import Trust

Okddip = Callable[..., Answer]

HOSTILE = [
    "a\nokddip seed=1; touch owned",
    "a\r\n\tb\x0b\x0c\x85c\u2028d",
    "\x1b]0;title\x07\x1b[2J\x1b[31m",
    "\x9b2J\x9d0;title\x9c",
    "\u202egnp.exe\u2066",
    '=HYPERLINK("http://example.org","x")',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1,2)",
    "\uff1d1+1",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1)) ![y](http://example.org/z.png)",
    "https://example.org www.example.org",
    "a | b `c` *d* # e",
    r"$\frac{$ $\undefined$ \input{/etc/passwd} 100% & {_} ~ ^",
    "'; touch owned #",
    "$(touch owned) `touch owned`",
]
EVERYTHING = " ".join(HOSTILE)
SEEDS = (0, 1)


def acting(text: str) -> list[str]:
    """The characters in it that a terminal would obey or hide."""
    return [char for char in text if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp") and char != "\n"]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Runs whose data set, model, device and a setting are called as somebody likes."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    MLflow(uri, "okddip").open()
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("okddip").experiment_id
    params = run_params(configuration("method=okddip", "method.peers=3", "trainer.epochs=1"))
    params |= {"dataset": EVERYTHING, "model": EVERYTHING}
    for text in HOSTILE:
        for seed in SEEDS:
            mine = params | {"method.colour": text, "seed": str(seed)}
            run_id = client.create_run(experiment, tags={"device": EVERYTHING}).info.run_id
            names = ("final/top1", "best/top1", "test/top1", "test/ensemble/top1", "test/mean/top1")
            metrics = [Metric(name, 90.0 + seed, 0, 0) for name in (*names, "train/images_per_second")]
            client.log_batch(run_id, metrics, [Param(key, value) for key, value in mine.items()])
            client.set_terminated(run_id)
    return uri


class Report:
    def __init__(self, folder: Path, texts: list[str], formulas: list[str], note: str) -> None:
        self.folder, self.texts, self.formulas, self.note = folder, texts, formulas, note

    def __getitem__(self, ending: str) -> str:
        return (self.folder / f"table.{ending}").read_bytes().decode()


@pytest.fixture(scope="module")
def report(uri: str, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report on them, with all texts of its figures and the description of a parent run."""
    client = MlflowClient(uri)
    parent = client.create_run(client.create_experiment("parents")).info.run_id
    texts: list[str] = []
    formulas: list[str] = []

    def savefig(figure: Figure, path: Path, **settings: object) -> None:
        for text in figure.findobj(matplotlib.text.Text):
            assert isinstance(text, matplotlib.text.Text)
            texts.append(text.get_text())
            formulas.extend([text.get_text()] if text.get_parse_math() and "$" in text.get_text() else [])
        save(figure, path, **settings)

    save = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        folder = make(
            client, runs.find_runs(client, uri, "okddip"), tmp_path_factory.mktemp("report"), parent
        )
    return Report(folder, texts, formulas, client.get_run(parent).data.tags["mlflow.note.content"])


def test_a_table_of_text_has_a_line_a_row_and_commands_no_terminal(report: Report) -> None:
    text = report["txt"]
    assert not acting(text)
    rows = [line for line in text.splitlines() if line.startswith("okddip ")]
    assert len(rows) == len(HOSTILE)
    assert r"\x1b]0;title\x07" in text


def test_figures_show_text_as_it_is(report: Report) -> None:
    assert len(list(report.folder.glob("*.png"))) >= 2
    together = "\n".join(report.texts)
    assert not acting(together)
    assert r"$\frac{$" in together
    assert not report.formulas


def test_markdown_has_no_links_images_or_tags(report: Report) -> None:
    for text in (report["md"], report.note.partition("![")[0]):
        assert not acting(text)
        assert "<" not in text
        plain = re.sub(r"\\.", "", text)
        assert not re.search(r"\]\(|://|`|(?<!\w)www\.", plain)
        rows = [line for line in plain.splitlines() if line.startswith("|")]
        assert len(rows) == len(HOSTILE) + 2
        assert len({line.count("|") for line in rows}) == 1
    for link in re.findall(r"!\[.*?\]\((.*?)\)", report.note):
        assert re.fullmatch(r"get-artifact\?path=report/[\w.%-]+&run_uuid=\w+", link)


def test_latex_has_as_many_cells_in_each_row_and_runs_nothing(report: Report) -> None:
    text = report["tex"]
    assert not acting(text)
    assert not re.search(r"\\(input|frac|undefined)", text)
    rows = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(rows) == len(HOSTILE) + 1
    assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1
    for row in rows:
        assert re.sub(r"\\.", "", row).count("{") == re.sub(r"\\.", "", row).count("}")
        assert not row.startswith(("[", "*"))


def test_cells_of_a_csv_file_are_no_formulas_and_numbers_stay_numbers(report: Report) -> None:
    assert not acting(report["csv"])
    assert len(report["csv"].splitlines()) == len(HOSTILE) + 1
    table = pd.read_csv(report.folder / "table.csv", keep_default_na=False)
    for text in filter(lambda cell: isinstance(cell, str), [*table.columns, *table.to_numpy().ravel()]):
        assert not text.startswith(("=", "+", "-", "@", "\uff1d", "\t", "\r")), text
    assert "'-2+3" in set(table["colour"])
    assert table["last_mean"].tolist() == [90.5] * len(HOSTILE)
    assert table["peers"].tolist() == [3] * len(HOSTILE)


@pytest.mark.parametrize("text", [EVERYTHING, *HOSTILE])
def test_a_run_called_so_has_no_second_command(okddip: Okddip, uri: str, text: str, tmp_path: Path) -> None:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("okddip").experiment_id
    tags = {"kind": "sweep", "command": "okddip -m seed=0,1 'name=a b'", "uncommitted": text}
    run_id = client.create_run(experiment, run_name=text, tags=tags).info.run_id
    if text == EVERYTHING:
        answer = okddip("task=report", f"report.run={run_id}", f"tracking.uri={uri}")
        assert answer.code == 0, answer.err
        printed = answer.out
    else:
        printed = reproducing_command(client, run_id, Trust())
    assert not acting(printed)
    about, command = printed.strip().splitlines()
    assert about.startswith("# ")
    assert shlex.split(command) == ["okddip", "-m", "seed=0,1", "name=a b"]
    # as at the prompt of a shell that knows no comments
    subprocess.run(["bash", "-c", f"true {about[1:]}"], cwd=tmp_path, check=True)
    assert not Path("owned").exists()


@pytest.mark.parametrize(
    "command",
    [
        *("okddip seed=1; touch owned", "okddip seed=1 ; touch owned", "okddip && touch owned", "rm -rf x"),
        *("okddip\ntouch owned", "okddip `touch owned`", "okddip 'seed=1", "", "\x1b[2J", "sh -c okddip"),
        *("okddip --shell-completion install", "okddip > owned", "okddip --config-dir"),
    ],
)
@pytest.mark.parametrize("kind", ["sweep", "training"])
def test_another_command_in_a_tag_is_not_printed(uri: str, command: str, kind: str) -> None:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("okddip").experiment_id
    tags = {"command": command, **({"kind": "sweep"} if kind == "sweep" else {})}
    run = client.create_run(experiment, tags=tags)
    with pytest.raises(ConfigError) as refused:
        reproducing_command(client, run.info.run_id, Trust())
    said = str(refused.value)
    assert (
        "is no call of okddip" in said if kind == "sweep" else said.endswith("this run keeps no config.yaml.")
    )
    assert not re.search("touch|seed=1|owned", said)


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        pytest.param({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, marks=pytest.mark.slow),
    ],
)
def test_a_terminal_without_the_letters_costs_nothing(environment: dict[str, str], uri: str) -> None:
    store = MlflowClient(uri)
    small = store.create_experiment(f"small {len(environment)}")
    params = run_params(configuration("method=baseline", "trainer.epochs=1")) | {"model": "сеть"}
    for seed in ("0", "1"):
        run_id = store.create_run(small).info.run_id
        metrics = [Metric(name, 90.0, 0, 0) for name in ("final/top1", "best/top1", "test/top1")]
        named = (params | {"seed": seed}).items()
        store.log_batch(run_id, metrics, [Param(key, value) for key, value in named])
        store.set_terminated(run_id)
    command = ["task=report", f"tracking.uri={uri}", f"tracking.experiment='small {len(environment)}'"]
    done = subprocess.run(
        [sys.executable, "-m", "okddip.main", *command, "report.out=report"],
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert rb"90.00 \xb1 0.00" in done.stdout
    assert rb"\u0441\u0435\u0442\u044c" in done.stdout
    assert len(list(Path("report").glob("*.pdf"))) == 2
