"""A SQLite store that was moved or copied with its folder: its artifacts and its runs' folders are there now.

MLflow keeps absolute paths; it would look for artifacts in the old folder, or make that anew.
"""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from okddip.tracking.unsent import LOCK

if TYPE_CHECKING:
    from sqlalchemy import Engine

logger = logging.getLogger(__name__)

ARTIFACTS = "mlartifacts"  # beside the store; `mlflow server` keeps them there too, if started in that folder
ADDRESS = re.compile(rf"file://(/.*)/({ARTIFACTS}(?:/.*)?)")


def follow_move(engine: "Engine", file: Path) -> None:
    """Change the absolute paths in a store to where they lead now, as far as they led into its old folder.

    What is not in the new folder keeps its address: a store may have been copied alone, or its artifacts may
    lie on a disk that is away just now.

    Args:
        engine: of the store.
        file: the store; absolute.
    """
    from sqlalchemy import text

    here = file.parent
    with engine.connect() as connection:
        rows = [  # table, column, the row's own name, its address
            *(
                ("experiments", "artifact_location", "experiment_id", *row)
                for row in connection.execute(
                    text("SELECT experiment_id, artifact_location FROM experiments")
                )
            ),
            *(
                ("runs", "artifact_uri", "run_uuid", *row)
                for row in connection.execute(
                    text("SELECT run_uuid, artifact_uri FROM runs WHERE artifact_uri NOT LIKE :here"),
                    {"here": f"{here.as_uri()}/%"},
                )
            ),
        ]
        addresses = [(*row, match) for row in rows if (match := ADDRESS.fullmatch(row[-1] or ""))]
        left = {old for old in (Path(unquote(match[1])) for *_, match in addresses) if was_left(old, file)}
        if not left:
            return
        for table, column, key, name, _, match in addresses:
            is_here = table == "experiments" or (here / unquote(match[2])).exists()  # or will be, of new runs
            if is_here and Path(unquote(match[1])) in left:
                change = text(f"UPDATE {table} SET {column} = :address WHERE {key} = :name")
                connection.execute(change, {"address": f"{here.as_uri()}/{match[2]}", "name": name})
        tags = text("SELECT run_uuid, key, value FROM tags WHERE key IN ('folder', :lock)")
        for run_id, key, value in connection.execute(tags, {"lock": LOCK}).all():
            for old in left & set(Path(value).parents):
                place = here / Path(value).relative_to(old)
                if place.exists():
                    change = text("UPDATE tags SET value = :place WHERE run_uuid = :run AND key = :key")
                    connection.execute(change, {"place": str(place), "run": run_id, "key": key})
        connection.commit()
    for old in sorted(left):
        logger.info(
            "The store was moved or copied from %s to %s: runs and artifacts are looked for here.", old, here
        )


def was_left(old: Path, file: Path) -> bool:
    """Whether a store was moved or copied out of a folder: that is another, and has its artifacts no more,
    or a store of its own."""
    try:
        if old.samefile(file.parent):
            return False
        return (old / file.name).exists() or not (old / ARTIFACTS).exists()
    except OSError:  # it is not there, or not for this user
        return True
