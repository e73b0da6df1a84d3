"""MLflow's tables in a SQLite file: made whole or not at all, and refused where they are not whole."""

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from okddip.errors import ConfigError
from okddip.files import sync_folder
from okddip.signals import raise_if_stopping
from okddip.text import for_shell_word
from okddip.tracking.address import absolute_uri
from okddip.tracking.moved import follow_move

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine

CONNECT_SECONDS = 6.0  # until a file that others write to is given up
LOCK_SECONDS = 120.0  # for other processes that make the same new store; seconds each

NEW = ".new"  # ends the name of a store that is not whole yet
BESIDE = ("-journal", "-wal", "-shm")  # ends the names of SQLite's own files beside a database


@contextmanager
def complete_store(uri: str) -> Iterator[Path]:
    """The file of a SQLite store with all of MLflow's tables, made if it is absent or empty; others wait.

    MLflow makes them in some fifty steps, and cannot go on where it was stopped between two of them. So they
    are made under another name, by one process at a time.

    Raises:
        ConfigError: the store was made by another version of MLflow, or not to its end.
        OSError: the folder cannot be written.
        ValueError: the address names no file.
        sqlite3.Error: the file is no database, or cannot be opened.
    """
    from filelock import FileLock
    from sqlalchemy import NullPool, create_engine, inspect
    from sqlalchemy.engine import make_url

    if make_url(uri).database in (None, "", ":memory:"):
        raise ValueError("it would be gone with the run")
    url = make_url(absolute_uri(uri))
    file = Path(str(url.database))
    if file.exists():
        # MLflow tries for minutes to open a file that cannot be opened
        with closing(sqlite3.connect(file, timeout=CONNECT_SECONDS)) as connection:
            connection.execute("PRAGMA schema_version")
    else:
        try:
            with tempfile.TemporaryFile(dir=file.parent):  # before the lock, which makes missing folders
                pass
        except OSError as error:
            raise OSError(f"unable to open a file in {file.parent}: {error.strerror}") from error
    for place in (file, file.parent):  # SQLite's journal stands beside the file
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError(f"{place} cannot be written")
    # imported under the lock, they would let many runs that start together wait for each other
    import mlflow.store.db.utils
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    with FileLock(f"{file}.lock", timeout=LOCK_SECONDS):
        engine = create_engine(url, poolclass=NullPool)
        if file.exists() and (tables := set(inspect(engine).get_table_names())):
            check_tables(engine, tables)
            follow_move(engine, file)
        else:
            create_store(url)
        yield file


def create_store(url: "URL") -> None:
    """Make a new store as FILE.new, and give it its name when it is whole."""
    from mlflow.store.db.utils import _initialize_tables
    from sqlalchemy import NullPool, create_engine

    file = Path(os.path.realpath(str(url.database)))  # a link stays one
    new = file.with_name(file.name + NEW)
    remove(new)  # of a process that was killed
    try:
        new.touch()  # with what the umask allows: SQLite itself would let nobody else write
        # an engine of its own: MLflow keeps those that it makes itself, with their files open
        _initialize_tables(create_engine(url.set(database=str(new)), poolclass=NullPool))
        raise_if_stopping()
        remove(file)  # SQLite would play back into this store the journal of a lost one
        new.replace(file)
        sync_folder(file.parent)
    finally:
        remove(new)


def remove(file: Path) -> None:
    """Remove a database with SQLite's own files."""
    for ending in ("", *BESIDE):
        file.with_name(file.name + ending).unlink(missing_ok=True)


def check_tables(engine: "Engine", tables: set[str]) -> None:
    """Refuse a store whose tables are not those of the installed MLflow.

    MLflow would change them in place, in steps that must not be cut off.

    Raises:
        ConfigError: says what to do.
    """
    import mlflow
    from mlflow.store.db.utils import _get_latest_schema_revision, _get_schema_version

    wanted, found = _get_latest_schema_revision(), _get_schema_version(engine)
    if found == wanted:
        return
    file, where = engine.url.database, engine.url.render_as_string()
    if "experiments" not in tables:
        raise ConfigError(
            f"tracking.uri={where}: is a database of another program, with the tables"
            f" {', '.join(sorted(tables))}. Name another file."
        )
    if has_content(engine, tables):
        raise ConfigError(
            f"tracking.uri={where}: this store is of another version of MLflow than {mlflow.__version__}"
            f" (its tables are of revision {found}, not {wanted}). Of an older one: copy it, then"
            f" `mlflow db upgrade {for_shell_word(where)}`, and do not stop that. Of a newer one: install"
            " that."
        )
    raise ConfigError(
        f"tracking.uri={where}: this store is half made: what made it was stopped. Nothing is in it, so"
        f" nothing is lost: remove {file}, and give the command again. (If another program is making it just"
        " now, wait for that.)"
    )


def has_content(engine: "Engine", tables: set[str]) -> bool:
    """Whether a store of whatever version of MLflow has a run, or an experiment beside MLflow's own first."""
    from sqlalchemy import text

    queries = {
        "runs": "SELECT 1 FROM runs",
        "experiments": "SELECT 1 FROM experiments WHERE experiment_id <> 0",
    }
    with engine.connect() as connection:
        return any(
            connection.execute(text(f"{query} LIMIT 1")).first()
            for table, query in queries.items()
            if table in tables
        )
