"""MLflow's tables in a database: made whole or not at all, and refused where they are not whole."""

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from okddip.errors import ConfigError

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine

ANSWER_SECONDS = 6.0  # until a SQLite file that others write to is given up
LOCK_SECONDS = 120.0  # for other processes that make the same new store; seconds each

NEW = ".new"  # ends the name of a store that is not whole yet
BESIDE = ("-journal", "-wal", "-shm")  # ends the names of SQLite's own files beside a database
NO_CONTENT = {"alembic_version", "workspaces", "experiments"}  # tables that MLflow fills where there is none


@contextmanager
def whole_sqlite(url: "URL") -> Iterator[None]:
    """A SQLite store with all of MLflow's tables, made if it is absent or an empty file; others wait.

    MLflow makes them in some fifty steps, and cannot go on where it was stopped between two of them. So they
    are made under another name, by one process at a time.

    Raises:
        ConfigError: the store was made by another version of MLflow, or not to its end.
        OSError: the folder cannot be written.
        sqlite3.Error: the file is no database, or cannot be opened.
    """
    from filelock import FileLock
    from sqlalchemy import NullPool, create_engine

    file = Path(str(url.database))
    if file.exists():
        # MLflow tries for minutes to open a file that cannot be opened
        with closing(sqlite3.connect(file, timeout=ANSWER_SECONDS)) as connection:
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
    with FileLock(f"{file}.lock", timeout=LOCK_SECONDS):
        if file.exists() and not is_empty(engine := create_engine(url, poolclass=NullPool)):
            refuse_unfinished(engine)
        else:
            build(url, file)
        yield


def build(url: "URL", file: Path) -> None:
    """Make a new store as FILE.new, and give it its name when it is whole.

    Args:
        url: of the store.
        file: that it is.
    """
    from mlflow.store.db.utils import _initialize_tables
    from sqlalchemy import NullPool, create_engine

    file = Path(os.path.realpath(file))  # a link stays one
    new = file.with_name(file.name + NEW)
    remove(new)  # of a process that was killed
    try:
        # an engine of its own: MLflow keeps those that it makes itself, with their files open
        engine = create_engine(url.set(database=str(new)), poolclass=NullPool)
        _initialize_tables(engine)
        for ending in BESIDE:  # SQLite would play back into this store what a lost one has left
            file.with_name(file.name + ending).unlink(missing_ok=True)
        new.replace(file)
        sync(file.parent)
    finally:
        remove(new)


def remove(file: Path) -> None:
    for ending in ("", *BESIDE):
        file.with_name(file.name + ending).unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """See a new name onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_empty(engine: "Engine") -> bool:
    from sqlalchemy import inspect

    return not inspect(engine).get_table_names()


def refuse_unfinished(engine: "Engine") -> None:
    """Refuse a store whose tables are not those of the installed MLflow.

    MLflow would change them in place, in steps that must not be cut off.

    Args:
        engine: of a database that is not empty.

    Raises:
        ConfigError: says whether anything is in it, and what to do.
    """
    import mlflow
    from mlflow.store.db.utils import _get_latest_schema_revision, _get_schema_version
    from sqlalchemy import inspect, text

    wanted, found = _get_latest_schema_revision(), _get_schema_version(engine)
    if found == wanted:
        return
    where = engine.url.render_as_string()  # without a password
    quoted = engine.dialect.identifier_preparer.quote
    with engine.connect() as connection:

        def rows(table: str, condition: str = "1 = 1") -> bool:
            return bool(
                connection.execute(text(f"SELECT 1 FROM {quoted(table)} WHERE {condition} LIMIT 1")).first()
            )

        tables = set(inspect(connection).get_table_names())
        content = any(rows(table) for table in tables - NO_CONTENT)
        content = content or ("experiments" in tables and rows("experiments", "experiment_id <> 0"))
        ours = "experiments" in tables
    if not ours:
        raise ConfigError(
            f"tracking.uri={where}: is a database of another program, with the tables"
            f" {', '.join(sorted(tables))}. Name another file."
        )
    if content:
        raise ConfigError(
            f"tracking.uri={where}: this store is of another version of MLflow than {mlflow.__version__} (its"
            f" tables are of revision {found}, not {wanted}). Of an older one: copy it, then"
            f" `mlflow db upgrade {where}`, and do not stop that. Of a newer one: install that."
        )
    file = engine.url.database
    raise ConfigError(
        f"tracking.uri={where}: this store is half made (its tables are of revision {found}, not {wanted}):"
        " what made it was stopped. No run is in it, so nothing is lost: remove"
        f" {file}, and give the command again. (If another program is making it just now, wait for that.)"
    )
