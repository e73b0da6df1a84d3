"""Who runs which code where."""

import getpass
import os
import socket
import subprocess
import sys
from pathlib import Path

from okddip.version import __version__

MOST_FILES = 10  # named in a tag


def source_tags() -> dict[str, str]:
    """Who runs which code where; in MLflow's own tags, where it has one."""
    tags = {
        "mlflow.source.name": Path(sys.argv[0]).name,
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
        "host": socket.gethostname(),
        "version": __version__,
    }
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():  # installed: what can change is the user's own code
        checkout = Path.cwd()
    if commit := git_commit(checkout):
        tags["mlflow.source.git.commit"] = commit
        if changed := git_changes(checkout):
            more = f" and {len(changed) - MOST_FILES} more" if len(changed) > MOST_FILES else ""
            tags["mlflow.source.git.dirty"] = "true"
            tags["uncommitted"] = ", ".join(changed[:MOST_FILES]) + more
    return tags


def git_commit(folder: Path) -> str | None:
    """The commit checked out in `folder`; None where there is none, or no git."""
    return _git(folder, "rev-parse", "--verify", "--quiet", "HEAD").strip() or None


def git_changes(folder: Path) -> list[str]:
    """The tracked files of a checkout that are not as they were committed."""
    return _git(folder, "diff", "--name-only", "HEAD").splitlines()


def _git(folder: Path, *command: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=5
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return str(os.getuid())
