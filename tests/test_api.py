"""The program from Python: the same runs as from the command line, and nothing left behind."""

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copyfile
from types import SimpleNamespace
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
import yaml
from conftest import Answer
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from mlflow_stores import start
from omegaconf import OmegaConf
from test_main import REPOSITORY, blocks_of_the_readme

import okddip
from okddip import api, distributed
from okddip.errors import ConfigError
from okddip.tracking.tracker import MLflow

SMALL = ["experiment=quickstart", "trainer.epochs=2", "trainer.limit_batches=1", "method=baseline"]


@pytest.fixture
def store(uri: str, tmp_path: Path) -> str:
    """A store of this test's own in its folder, where the program expects it."""
    copyfile(uri.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def state_of_the_process() -> tuple[Any, ...]:
    return (
        *(
            list(sys.argv),
            Path.cwd(),
            {key for key in os.environ if "OKDDIP" in key},
            logging.getLogger().level,
        ),
        *(list(logging.getLogger().handlers), GlobalHydra.instance().hydra, HydraConfig.instance().cfg),
        *(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)),
    )


def test_importing_the_package_imports_nothing_heavy() -> None:
    probe = (
        "import sys, okddip; assert {'compose', 'train', 'runs', 'history'} <= set(dir(okddip));"
        "sys.exit(str({'torch', 'mlflow', 'pandas', 'hydra'} & set(sys.modules) or '') or 0)"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=REPOSITORY)
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        okddip.nope  # noqa: B018


@pytest.mark.slow
def test_two_runs_of_a_process_are_in_the_store_and_leave_nothing_else(store: str, tmp_path: Path) -> None:
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):  # the caller's own
        before = state_of_the_process()
        config = okddip.compose([*SMALL, "hydra.run.dir=first"])
        config.optimizer.lr = 0.05
        first = okddip.train(config)
        second = okddip.train([*SMALL, "seed=1", "trainer.epochs=1"])
        assert state_of_the_process() == before
        assert compose("config", ["seed=7"]).seed == 7

    assert first.folder == tmp_path / "first"
    assert list(first.metrics.index) == [1, 2]
    rows = okddip.runs()
    assert list(rows.index) == [first.run_id, second.run_id]
    assert list(rows["status"]) == ["FINISHED", "FINISHED"]
    assert list(rows["seed"]) == [0, 1]
    assert list(rows["optimizer.lr"]) == [0.05, 0.1]
    assert rows.loc[first.run_id, "final/top1"] == first.metrics["test/top1"].iloc[-1]
    by_epoch = okddip.history(str(first.run_id), "train/loss")
    pd.testing.assert_series_equal(by_epoch, first.metrics["train/loss"])

    command = shlex.join(["okddip", *SMALL, "hydra.run.dir=first", "optimizer.lr=0.05"])
    run = mlflow.MlflowClient(store).get_run(str(first.run_id))
    assert run.data.tags["command"] == command
    assert (first.folder / "main.log").read_text().count("test top-1 (%)") == 1
    hydras = yaml.safe_load((first.folder / ".hydra" / "overrides.yaml").read_text())
    assert hydras == [*SMALL, "optimizer.lr=0.05"]


def test_what_is_no_run_or_no_metric_of_the_store_is_named_in_a_sentence(tracker: MLflow, uri: str) -> None:
    def refusal(function: Callable[..., Any], *arguments: Any, **named: Any) -> str:
        with pytest.raises(ConfigError) as refused:
            function(*arguments, uri=uri, **named)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    empty = refusal(okddip.runs, experiment=tracker.experiment)
    assert empty.startswith(f"There is no training run in tracking.uri={uri}, ")
    assert "where=params.a == 1" in refusal(okddip.runs, where="params.a == 1", experiment=tracker.experiment)
    run_id = start(tracker)
    tracker.log({"test/top1": 90.0, "test/top5": 99.0, "final/top1": 90.0}, 0)
    tracker.finish("FINISHED")
    assert f"run=nope: Run with id=nope not found in tracking.uri={uri}." in refusal(
        okddip.history, "nope", "test/top1"
    )
    assert "near it are test/top1, test/top5." in refusal(okddip.history, run_id, "test/topp1")
    assert "no such metric by epoch" in refusal(okddip.history, run_id, "final/top1")
    assert list(okddip.history(f"runs:/{run_id}", "test/top1", uri=uri)) == [90.0]


def test_a_changed_configuration_follows_and_composes_to_itself() -> None:
    config = okddip.compose(["experiment=quickstart", "seed=4", "hydra.run.dir=here"])
    assert api.overrides_of(config) == list(config.command)
    config.method.peers = 5
    config.trainer.resume = "auto"
    assert config.name == "okddip5-seed4-branch-resnet8-digits"
    words = api.overrides_of(config)
    assert words == [
        *("experiment=quickstart", "seed=4", "hydra.run.dir=here", "method.peers=5", "trainer.resume=auto"),
    ]
    again = okddip.compose(words)
    assert OmegaConf.to_container(again, resolve=True) == OmegaConf.to_container(config, resolve=True) | {
        "command": words
    }

    config.options.method = "one"
    with pytest.raises(ConfigError, match=r"config\.options\.method=one: only names the option"):
        api.overrides_of(config)


def test_the_configuration_of_an_earlier_run_composes_to_itself() -> None:
    stored = OmegaConf.to_container(okddip.compose(["dataset=digits", "seed=2"]), resolve=True)
    assert isinstance(stored, dict)
    del stored["command"]
    again = OmegaConf.to_container(okddip.compose(api.overrides_of(stored)), resolve=True)  # type: ignore[arg-type]
    assert isinstance(again, dict)
    del again["command"]
    assert again == stored
    with pytest.raises(ConfigError, match="is not the configuration of a run"):
        api.overrides_of({"seed": 1})


def test_options_of_ones_own_are_found(tmp_path: Path) -> None:
    option = tmp_path / "mine" / "model" / "small.yaml"
    option.parent.mkdir(parents=True)
    option.write_text("_target_: okddip.models.resnet.resnet\ndepth: 8\n")
    config = okddip.compose(["--config-dir=mine", "model=small"])
    config.seed = 2
    assert api.overrides_of(config) == ["--config-dir=mine", "model=small", "seed=2"]
    with pytest.raises(ConfigError, match="--config-dir=nowhere: there is no such folder"):
        okddip.compose(["--config-dir", "nowhere"])


def test_paths_are_taken_as_typed() -> None:
    for path in ("фото", "photos (1)", "lr=0.1,seed=1"):
        config = okddip.compose([*SMALL, "dataset=image_folder", f"dataset.root={path}"])
        assert config.dataset.root == path
        assert api.overrides_of(config) == config.command
    assert okddip.compose(["dataset.root=~/x"]).dataset.root == str(Path.home() / "x")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.epochs=-1", "trainer.epochs=-1"),
        ("+dataset.rooot=x", "dataset.rooot: is no option of okddip.data.dataset.Dataset. Did you mean"),
        ("+tracking.experimnt=x", "tracking.experimnt: is no option of"),
        ("method.peers=2", "method.peers=2: OKDDip takes at least 3"),
    ],
)
def test_a_configuration_is_checked_where_it_is_composed(override: str, message: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ConfigError, match=re.escape(message)):
        okddip.compose(["dataset=digits", override])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("seed=1", "must be a list of overrides"),
        (["-m", "seed=0,1"], "-m: is no override of one run"),
        (["seed=0,1"], "Ambiguous value for argument 'seed=0,1'"),
        (["method.peerz=3"], "Did you mean method.peers=3?"),
        (["method=nope"], "method=nope: there is no such option"),
        (["method=null"], "method=null: must be an option of conf/method"),
        (["name=${nobody}"], "nobody"),
        (["seed=-1"], "seed=-1"),
        (["task=report"], "okddip.train has task=train"),
        (["multirun_presets=quickstart"], "multirun_presets=quickstart: is a sweep"),
        (["hydra.job.chdir=true"], "hydra.job.chdir=true"),
        (["hydra.run.dir=file/run"], "hydra.run.dir=file/run: the output folder cannot be written"),
        (["method.peers=2", "tracking=none"], "method.peers=2: OKDDip takes at least 3"),
    ],
)
def test_a_run_that_is_refused_raises_our_error_and_leaves_nothing(
    words: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    before = state_of_the_process()
    with pytest.raises(ConfigError) as refused:
        okddip.train(words)
    assert message in str(refused.value)
    assert state_of_the_process() == before


@pytest.fixture
def ctrl_c_as_python_has_it() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_as_python_has_it")
def test_ctrl_c_passes_through_and_the_run_can_be_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*SMALL, "tracking=none", "hydra.run.dir=run"]

    def interrupted(epoch: int, *_: Any) -> None:
        if epoch == 1:
            signal.raise_signal(signal.SIGINT)

    before = state_of_the_process()
    with monkeypatch.context() as patched:
        patched.setattr(
            "okddip.tracking.tracker.NoTracking.log", lambda self, _, epoch, *__: interrupted(epoch)
        )
        with pytest.raises(KeyboardInterrupt):
            okddip.train(command)
    assert state_of_the_process() == before
    log = Path("run/main.log").read_text()
    assert f"Stopped. Resume with: {shlex.join(['okddip', *command, 'trainer.resume=auto'])}" in log
    resumed = okddip.train([*SMALL, "tracking=none", "hydra.run.dir=other", "trainer.resume=run"])
    assert resumed.folder == Path("run").absolute()
    assert list(resumed.metrics.index) == [1, 2]
    assert resumed.run_id is None


def test_a_handler_of_the_callers_own_prints_each_line_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = logging.getLogger()
    for handlers, printed in (([], 1), ([logging.StreamHandler(sys.stdout)], 1)):
        monkeypatch.setattr(root, "handlers", list(handlers))
        with api.logged(tmp_path):
            logging.getLogger("okddip").info("a line")
        assert root.handlers == handlers
        assert capsys.readouterr().out.count("a line") == printed
    assert (tmp_path / "main.log").read_text().count("a line") == 2


def test_bars_are_hidden_where_there_is_neither_terminal_nor_notebook(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert distributed.hide_progress_bar()
    kernel = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    assert not distributed.hide_progress_bar()


@pytest.mark.slow
def test_a_run_from_python_is_that_of_the_command_line(
    okddip: Callable[..., Answer], store: str, tmp_path: Path
) -> None:
    trained = api.train([*SMALL, "hydra.run.dir=python"])
    assert okddip(*SMALL, "hydra.run.dir=shell").code == 0
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("okddip").experiment_id
    shell, python = client.search_runs([experiment])  # the newest first
    assert python.info.run_id == trained.run_id
    assert python.info.run_name == shell.info.run_name
    assert python.data.params == shell.data.params
    tags = [
        {key: value.replace("python", "shell") for key, value in run.data.tags.items()}
        for run in (python, shell)
    ]
    for each in tags:
        del each["mlflow.source.name"]
    assert tags[0] == tags[1]
    measured = [
        {key: value for key, value in run.data.metrics.items() if "per_second" not in key}
        for run in (python, shell)
    ]
    assert measured[0] == measured[1]
    for name in ("config.yaml", "overrides.yaml"):
        files = [(tmp_path / folder / ".hydra" / name).read_text() for folder in ("python", "shell")]
        assert files[0] == files[1]
    assert {path.name for path in (tmp_path / "python").iterdir()} == {
        path.name for path in (tmp_path / "shell").iterdir()
    }
    lines = [
        re.findall(
            r"\[okddip\S*\]\[INFO\] - (epoch \d/\d +loss \S+)", (tmp_path / folder / "main.log").read_text()
        )
        for folder in ("python", "shell")
    ]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 2


def training_of_the_readme() -> str:
    """Its lines of Python up to the exported network, which `test_readme.py` has."""
    *_, snippet = blocks_of_the_readme("A tour")
    return snippet.partition("\nnet = ")[0]


@pytest.mark.slow
def test_the_lines_of_the_readme_run_in_a_fresh_folder(store: str, tmp_path: Path) -> None:
    snippet = training_of_the_readme()
    (tmp_path / "script.py").write_text(snippet + "\nprint(len(runs), run.run_id in runs.index)\n")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    finished = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.rstrip().endswith("1 True")


@pytest.mark.slow
def test_the_lines_of_the_readme_run_in_a_notebook_with_its_own_bar(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    snippet = training_of_the_readme()
    cells = [nbformat.v4.new_code_cell(part) for part in snippet.split("\n\n")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)
    printed = "".join(output.get("text", "") for output in outputs)
    assert printed.count("epoch 2/2") == 1
    assert (tmp_path / "outputs").is_dir()
