"""The address of a store, and where its pages are."""

import re
from pathlib import Path

from okddip.text import for_shell_word, for_terminal

ALLOWED_URIS = (
    "sqlite:///FILE in a folder that exists and can be written, the address of a running MLflow server "
    "(http://HOST:PORT), or a database as SQLAlchemy names it (postgresql+psycopg://USER@HOST/NAME after "
    "pip install 'psycopg[binary]'; mysql, mssql)"
)


LOCAL_SERVER = "http://127.0.0.1:5000"  # where `mlflow ui` shows its pages


def how_to_open(uri: str, experiment_id: str, run_id: str) -> str:
    """The address of a run's page; in a line before it, where the store is no server, what to start.

    For the terminal, beside the lines that say what a run is.
    """
    # without the last part MLflow shows its pages for language models
    page = f"/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"
    if uri.startswith(("http://", "https://")):
        return f"MLflow     {for_terminal(without_credentials(uri)).rstrip('/')}{page}"
    typed = uri if re.match("sqlite:///[^/~]", uri) else without_credentials(uri)
    start = f"mlflow ui --backend-store-uri {for_shell_word(typed)}"
    return f"MLflow     {start}\n           {LOCAL_SERVER}{page}"


def absolute_uri(uri: str) -> str:
    """A store's URI with a SQLite file's path made absolute.

    MLflow keeps an open store for each URI, and would find the one of a former working directory.
    """
    if not uri.startswith("sqlite:"):
        return uri
    from sqlalchemy.engine import make_url

    url = make_url(uri)
    return url.set(database=str(Path(str(url.database)).expanduser().absolute())).render_as_string()


def without_credentials(uri: str) -> str:
    """A store's absolute URI without user and password."""
    return re.sub("//[^/@]*@", "//", absolute_uri(uri))
