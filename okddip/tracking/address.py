"""The address of a store."""

import re
from pathlib import Path

ALLOWED_URIS = (
    "sqlite:///FILE in a folder that exists and can be written, the address of a running MLflow server "
    "(http://HOST:PORT), or a database as SQLAlchemy names it (postgresql+psycopg://USER@HOST/NAME after "
    "pip install 'psycopg[binary]'; mysql, mssql)"
)


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
