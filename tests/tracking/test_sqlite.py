"""A new store is whole or absent, whatever stops the process that makes it."""

import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import mlflow
import pytest
from mlflow.store.db import utils
from program import Program
from sqlalchemy import Engine, NullPool, create_engine, event
from sqlalchemy.engine import make_url

from okddip.errors import ConfigError
from okddip.signals import stop_on_signals
from okddip.tracking import sqlite
from okddip.tracking.store import open_store
from okddip.tracking.tracker import MLflow

TRAIN = ("experiment=quickstart", "trainer.epochs=1", "trainer.limit_batches=1")


@pytest.fixture(autouse=True)
def copied_tables() -> None:
    """Here MLflow makes the tables of new stores."""


def wait_for_the_file_of_a_store(folder: Path, alive: Callable[[], object]) -> None:
    while not list(folder.glob("mlflow.db*[!k]")):  # the lock comes before
        assert alive()
        time.sleep(0.001)


@contextmanager
def stopped_at(statement: int) -> Iterator[None]:
    """Break off the work on databases at their statement of that number."""
    seen = 0

    def count(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == statement:
            raise KeyboardInterrupt

    event.listen(Engine, "before_cursor_execute", count)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", count)


def half_made(file: Path, statement: int = 200) -> None:
    """A store as it was left where MLflow made it in its place, and was stopped."""
    with stopped_at(statement), pytest.raises(KeyboardInterrupt):
        utils._initialize_tables(create_engine(f"sqlite:///{file}", poolclass=NullPool))


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    tracker = MLflow(f"sqlite:///{file}", "first")
    tracker.open()
    return file


def works(file: Path) -> None:
    tracker = MLflow(f"sqlite:///{file}", "first")
    tracker.open()
    tracker.start("run", {}, {}, "", "okddip")
    tracker.finish("FINISHED")
    assert open_store(f"sqlite:///{file}").get_run(tracker.run_id).info.status == "FINISHED"


def open_new_store(folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
    with stop_on_signals():
        MLflow(f"sqlite:///{folder}/mlflow.db", "first").open()


def test_those_whom_the_umask_lets_can_write_to_a_new_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the tables themselves take seconds, and do not change who may write
    monkeypatch.setattr(utils, "_initialize_tables", lambda engine: engine.connect().close())
    before = os.umask(0o002)
    try:
        sqlite.create_store(make_url(f"sqlite:///{tmp_path}/mlflow.db"))
    finally:
        os.umask(before)
    assert (tmp_path / "mlflow.db").stat().st_mode & 0o777 == 0o664


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGKILL, 0.2),
        pytest.param(signal.SIGTERM, 0.1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 0.02, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_stopped_while_it_makes_a_store_leaves_none(
    tmp_path: Path, number: int, moment: float
) -> None:
    process = multiprocessing.get_context("fork").Process(target=open_new_store, args=(tmp_path,))
    process.start()  # has imported MLflow already, which takes longest
    wait_for_the_file_of_a_store(tmp_path, process.is_alive)
    time.sleep(moment)
    os.kill(process.pid or 0, number)
    process.join()
    assert process.exitcode != 0, "it was made before: stop earlier"
    assert not (tmp_path / "mlflow.db").exists()
    works(tmp_path / "mlflow.db")
    assert not list(tmp_path.glob("*.new*"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_python_drops_leaves_none_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StoppedInDestructor:  # and in what the garbage collector calls, of which SQLAlchemy has some
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def initialize(engine: Engine, really: Callable[[Engine], None] = utils._initialize_tables) -> None:
        StoppedInDestructor()
        really(engine)

    monkeypatch.setattr(utils, "_initialize_tables", initialize)
    with pytest.raises(SystemExit, match="143"):
        open_new_store(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} <= {"mlflow.db.lock"}  # which filelock may keep


@pytest.mark.slow
def test_a_run_stopped_at_any_moment_of_a_new_store_goes_on(tmp_path: Path) -> None:
    moments = random.Random(0)
    train = (*TRAIN, "trainer.epochs=150")  # goes on longer than the latest of these moments
    for number in range(6):
        folder = tmp_path / str(number)
        folder.mkdir()
        stopped = Program(folder, *train)
        kind = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[number % 3]
        wait_for_the_file_of_a_store(folder, lambda stopped=stopped: stopped.poll() is None)
        time.sleep(moments.uniform(0.1, 2.3))
        stopped.send_signal(kind)
        said, _ = stopped.communicate(timeout=300)
        if kind != signal.SIGKILL:
            assert "Resume with: okddip" in said
        again = Program(folder, *train, "trainer.resume=auto")
        output, _ = again.communicate(timeout=300)
        assert again.returncode == 0, f"{kind.name} {said} {output}"
        [run] = open_store(f"sqlite:///{folder}/mlflow.db").search_runs(["1"])
        assert run.info.status == "FINISHED"
        assert not list(folder.glob("mlflow.db[.-][!l]*"))


def test_a_new_store_knows_nothing_of_the_name_under_which_it_was_made(whole_store: Path) -> None:
    assert sqlite.NEW.encode() not in whole_store.read_bytes()
    places = {each.artifact_location for each in open_store(f"sqlite:///{whole_store}").search_experiments()}
    assert f"file://{whole_store.parent}/mlartifacts" in places


@pytest.mark.parametrize("statement", [20, 90, 200, 400])
def test_a_half_made_store_is_named_with_what_to_do(tmp_path: Path, statement: int) -> None:
    half_made(tmp_path / "mlflow.db", statement)
    with pytest.raises(ConfigError, match=r"half made.*nothing is lost: remove (?P<file>\S+),") as refusal:
        MLflow(f"sqlite:///{tmp_path}/mlflow.db", "first").open()
    assert str(tmp_path / "mlflow.db") in str(refusal.value)
    with pytest.raises(ConfigError, match="half made"):
        open_store(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.mark.slow
def test_a_store_made_again_in_the_place_of_a_half_made_one_works(tmp_path: Path) -> None:
    half_made(tmp_path / "mlflow.db")
    (tmp_path / "mlflow.db").unlink()
    (tmp_path / "mlflow.db-journal").write_bytes(b"of the one that was removed")
    works(tmp_path / "mlflow.db")
    assert not (tmp_path / "mlflow.db-journal").exists()


@pytest.mark.slow
def test_an_empty_file_becomes_a_store_and_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "real.db").touch()
    (tmp_path / "mlflow.db").symlink_to("elsewhere/real.db")
    works(tmp_path / "mlflow.db")
    assert (tmp_path / "mlflow.db").is_symlink()
    assert (tmp_path / "elsewhere" / "real.db").stat().st_size > 0


def test_a_store_of_another_version_of_mlflow_is_left_as_it_is_and_its_upgrade_named(
    tmp_path: Path, whole_store: Path
) -> None:
    from alembic import command

    file = tmp_path / "mlflow.db"
    shutil.copy(whole_store, file)
    engine = create_engine(f"sqlite:///{file}", poolclass=NullPool)
    mlflow.MlflowClient(f"sqlite:///{whole_store}").get_experiment_by_name("first")
    with engine.begin() as connection:
        config = utils._get_alembic_config(str(engine.url))
        config.attributes["connection"] = connection
        command.downgrade(config, "-1")
    before = file.read_bytes()
    with pytest.raises(
        ConfigError, match=rf"another version of MLflow.*`mlflow db upgrade sqlite:///{file}`"
    ):
        MLflow(f"sqlite:///{file}", "first").open()
    assert file.read_bytes() == before
    utils._upgrade_db(engine)  # what the command does
    MLflow(f"sqlite:///{file}", "first").open()


def test_a_database_of_another_program_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "mine.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE studies (name TEXT)")
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="another program, with the tables studies"):
        MLflow(f"sqlite:///{file}", "first").open()
    assert file.read_bytes() == before


def test_a_store_that_another_process_keeps_to_itself_is_named_with_what_to_do(
    whole_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "CONNECT_SECONDS", 0.1)
    with closing(sqlite3.connect(whole_store)) as other:
        other.execute("BEGIN EXCLUSIVE")  # as one that was stopped while it wrote
        with pytest.raises(ConfigError, match="another process has been writing to this store"):
            MLflow(f"sqlite:///{whole_store}", "first").open()
    works(whole_store)
