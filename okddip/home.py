"""A home folder for a user who has none, as in a container that runs under any number."""

import os
import stat
import sys
import tempfile
from pathlib import Path

from okddip.errors import ConfigError


def ensure_home() -> None:
    """Let a folder among the temporary ones be the home of a user without one: MLflow cannot do without.

    It is kept, so that decoded images are found again. `HOME` tells it to libraries and child processes.

    Raises:
        ConfigError: there is no such folder for this user alone.
    """
    try:
        Path.home()
        return
    except RuntimeError:
        pass
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"okddip-home-{user}"
    missing = f"HOME: is not set, and user {user} has no home folder"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(
            f"{missing}; {folder} cannot be made ({error.strerror}). Set HOME=FOLDER."
        ) from error
    # anybody may make folders there
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise ConfigError(f"{missing}; {folder} may be somebody else's. Set HOME=FOLDER.")
    os.environ["HOME"] = str(folder)
    print(f"{missing}: {folder} is taken. Set HOME to name another.", file=sys.stderr)
