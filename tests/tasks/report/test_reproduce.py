"""The command that reproduces a run composes to the run's configuration."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from mlflow.tracking import MlflowClient
from omegaconf import DictConfig, OmegaConf

from okddip.text import as_override
from okddip.tracking.tracker import MLflow

Okddip = Callable[..., Answer]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store whose tables exist; creating them takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    MLflow(uri, "okddip").open()
    return uri


@pytest.fixture
def store(uri: str, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """The program's default store in this test."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return MlflowClient(uri)


def printed_command(answer: Answer) -> list[str]:
    assert answer.code == 0, answer.err
    comment, command = answer.out.strip().splitlines()[-2:]
    assert comment.startswith("# ")
    return shlex.split(command)


@pytest.mark.slow
def test_a_job_of_a_sweep_gets_the_command_of_its_own(
    okddip: Okddip, configured: Callable[..., DictConfig], store: MlflowClient, tmp_path: Path
) -> None:
    sweep = (
        *("-m", "dataset=digits", "model=resnet8", "trainer.epochs=1", "trainer.limit_batches=1"),
        *(
            "optimizer=adamw",
            "scheduler=cosine",
            "method.ramp_epochs=0.5",
            "tracking.checkpoints=false",
            "dataset.image_size=[12,12]",
            "seed=0,1",
        ),
        *(r"name='it\'s,odd'", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra.job.num}"),
    )
    answer = okddip(*sweep)
    assert answer.code == 0, answer.err
    experiment = store.get_experiment_by_name("okddip")
    [run] = store.search_runs([experiment.experiment_id], "params.seed = '1'")
    program, *overrides = printed_command(okddip("task=report", f"report.run={run.info.run_id}"))
    assert program == "okddip"
    assert "optimizer=adamw" in overrides
    assert "dataset.image_size=[12,12]" in overrides
    assert not any("source" in override for override in overrides)
    composed = OmegaConf.create(OmegaConf.to_yaml(configured(*overrides), resolve=True))
    kept = OmegaConf.load(store.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path)))
    assert kept.name == "it's,odd"
    composed.trainer.resume = kept.trainer.resume  # jobs of a sweep go on where they were cut off
    assert composed == kept


@pytest.mark.slow
def test_a_run_that_an_older_version_lengthened_is_in_no_row_and_has_no_command(
    okddip: Okddip, configured: Callable[..., DictConfig], uri: str, store: MlflowClient
) -> None:
    small = ("dataset=digits", "model=resnet8", "method=baseline", "trainer.limit_batches=1")
    small = (*small, "tracking.experiment=longer", "trainer.epochs=1")
    assert okddip(*small).code == 0
    experiment = store.get_experiment_by_name("longer").experiment_id
    [run] = store.search_runs([experiment])
    assert "left out" not in okddip("task=report", "tracking.experiment=longer").out
    store.set_tag(run.info.run_id, "lengths", "2 4")
    answer = okddip("task=report", f"report.run={run.info.run_id}")
    assert answer.code == 1
    assert "so no single command reproduces it" in answer.err
    answer = okddip("task=report", "tracking.experiment=longer")
    assert answer.code == 1
    assert "Runs that an older version lengthened, left out: 1" in answer.err
    assert okddip(*small, "seed=1").code == 0
    table = okddip("task=report", "tracking.experiment=longer").out
    [row] = [line for line in table.splitlines() if line.startswith("baseline")]
    assert row.split()[2] == "1"  # run
    assert "Runs that an older version lengthened, left out: 1" in table


def test_the_parent_of_a_sweep_has_the_command_that_was_typed(okddip: Okddip, store: MlflowClient) -> None:
    experiment = store.get_experiment_by_name("okddip")
    typed = "okddip -m method=one,okddip 'name=a b'"
    parent = store.create_run(experiment.experiment_id, tags={"kind": "sweep", "command": typed})
    answer = okddip("task=report", f"report.run={parent.info.run_id}")
    assert printed_command(answer) == shlex.split(typed)


@pytest.mark.parametrize(
    "typed",
    [
        "okddip --config-dir /elsewhere model=evil",
        "okddip -cd /elsewhere seed=0,1",
        "okddip task._target_=os.system +task.command=id",
        "okddip +hydra.callbacks.x._target_=timeit.timeit",
        "okddip 'hydra.searchpath=[file:///elsewhere]' method=x",
    ],
)
def test_the_command_of_a_sweep_that_names_code_is_not_printed(
    okddip: Okddip, store: MlflowClient, typed: str
) -> None:
    experiment = store.get_experiment_by_name("okddip")
    parent = store.create_run(experiment.experiment_id, tags={"kind": "sweep", "command": typed})
    answer = okddip("task=report", f"report.run={parent.info.run_id}")
    assert answer.code == 1
    assert "names code or option files" in answer.err
    assert answer.out == ""


def kept_run(uri: str, config: DictConfig, command: str = "okddip") -> str:
    tracker = MLflow(uri, "okddip")
    tracker.open()
    tracker.start("run", {}, {}, OmegaConf.to_yaml(config, resolve=True), command)
    tracker.finish("FINISHED")
    return tracker.run_id


def test_keys_that_came_and_went_since_are_added_and_removed(
    okddip: Okddip, configured: Callable[..., DictConfig], store: MlflowClient, uri: str
) -> None:
    config = configured(
        "+optimizer.extra={a: 1, b: '2'}", "~trainer.tf32", "trainer.resume=auto", "model=vgg16"
    )
    command = printed_command(okddip("task=report", f"report.run={kept_run(uri, config)}"))
    assert command == [
        *("okddip", "model=vgg16", "~trainer.tf32", "+optimizer.extra.a=1", "+optimizer.extra.b='2'")
    ]


def test_an_option_file_of_the_users_own_is_asked_for_and_found(
    okddip: Okddip, configured: Callable[..., DictConfig], store: MlflowClient, uri: str, tmp_path: Path
) -> None:
    config = configured()
    config.options.model = "mine"
    config.model = {"_target_": "mine.Mine"}
    run_id = kept_run(uri, config, "okddip --config-dir options model=mine")
    answer = okddip("task=report", f"report.run={run_id}")
    assert answer.code == 1
    assert "started with --config-dir options: give that here too" in answer.err
    (tmp_path / "options" / "model").mkdir(parents=True)
    (tmp_path / "options" / "model" / "mine.yaml").write_text("_target_: mine.Mine\n")
    command = printed_command(okddip("--config-dir", "options", "task=report", f"report.run={run_id}"))
    assert command == ["okddip", "--config-dir", "options", "model=mine"]


def test_a_run_without_configuration_is_refused_with_what_was_typed(
    okddip: Okddip, store: MlflowClient
) -> None:
    experiment = store.get_experiment_by_name("okddip")
    run = store.create_run(experiment.experiment_id, tags={"command": "okddip -m seed=0,1"})
    answer = okddip("task=report", f"report.run={run.info.run_id}")
    assert answer.code == 1
    assert "keeps no config.yaml. It was started with: okddip -m seed=0,1" in answer.err


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
plain |= st.text(st.characters(codec="ascii", min_codepoint=32)).filter(lambda text: "${" not in text)
parser = OverridesParser.create()


@given(st.recursive(plain, lambda inner: st.lists(inner, max_size=3), max_leaves=5))
def test_a_value_is_parsed_as_what_it_was(value: Any) -> None:
    parsed = parser.parse_override(f"key={as_override(value)}").value()
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    "text", ["null", "True", "1e3", "07", "", " a ", "a,b", "it's", "\\", "a\\'b", "x=y"]
)
def test_a_string_that_looks_like_something_else_stays_a_string(text: str) -> None:
    assert parser.parse_override(f"key={as_override(text)}").value() == text
