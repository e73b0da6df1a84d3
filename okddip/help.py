"""What `okddip --help` prints: groups, sweeps, and the composed configuration with its comments.

Hydra's own help takes seconds, as it looks for subgroups in every option file, and shows no comments.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from textwrap import fill

from okddip.assembly import CONFIG_HOME
from okddip.command_line import config_folders
from okddip.hooks import short_errors
from okddip.text import for_terminal

HEADER = """\
okddip: online knowledge distillation, from Hydra config groups into MLflow.

  okddip [OVERRIDE ...]                    one run
  okddip -m seed=0,1,2 method=okddip,one   a sweep: commas are values to try
  okddip multirun_presets=NAME             a sweep with a name, see below
  okddip task=evaluate checkpoint=...      another task
  okddip method=one --help                 the settings of this method
  okddip --cfg job [OVERRIDE ...]          print the composed configuration
  okddip --hydra-help                      Hydra's own flags and settings, hydra/launcher=joblib for one
"""
SETTING = re.compile(r"( *)([A-Za-z_]\w*):")
COMMENT = re.compile(r"(?:^|\s)# (.*)$")
GLOBAL = "@package _global_"
COLUMN = 44  # where comments begin


def print_help(main: Callable[[], object]) -> None:
    """Print what there is to choose from, then the configuration that the command line composes.

    Args:
        main: Hydra's entry, which prints that configuration.
    """
    typed = [part for part in sys.argv[1:] if part not in ("--help", "-h")]
    print(for_terminal(usage(CONFIG_HOME, typed), lines=True))
    sys.argv[1:] = ["--cfg", "job", *typed]
    with redirect_stdout(StringIO()) as printed, short_errors():
        main()
    print(for_terminal(with_comments(printed.getvalue(), CONFIG_HOME, typed), lines=True))


def usage(home: Path, arguments: Sequence[str] = ()) -> str:
    """Groups with their options, sweeps with a line each, and the heading of the configuration.

    Args:
        home: where `conf` and `multirun_presets` are.
        arguments: of the command line; a `--config-dir` among them adds options.
    """
    groups: dict[str, set[str]] = {}
    folders = [home / "conf", *config_folders(arguments)]
    for option in (option for folder in folders for option in folder.glob("*/*.yaml")):
        groups.setdefault(option.parent.name, set()).add(option.stem)
    presets = sorted((home / "multirun_presets").glob("*.yaml"))
    width = max(len(path.stem) for path in presets)
    return "\n".join(
        [
            HEADER,
            "Groups (group=option):",
            *(
                fill(
                    " ".join(sorted(options)),
                    100,
                    initial_indent=f"  {group:<11}",
                    subsequent_indent=" " * 13,
                )
                for group, options in sorted(groups.items())
            ),
            "\nSweeps (multirun_presets=NAME):",
            *(f"  {path.stem:<{width}}  {first_comment(path)}" for path in presets),
            "\nConfiguration (key=value):",
        ]
    )


def first_comment(path: Path) -> str:
    """The first comment of an option file, without Hydra's `@package` line."""
    comments = (line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    return next((comment for comment in comments if not comment.startswith("@")), "")


def with_comments(printed: str, home: Path, arguments: Sequence[str] = ()) -> str:
    """A composed configuration with the comments that option files give its keys.

    Args:
        printed: the configuration as YAML.
        home: where `conf` is.
        arguments: see `usage`.
    """
    folders = [home / "conf", *config_folders(arguments)]
    used = [path for folder in folders for path in folder.glob("*/*.yaml") if is_used(path, printed)]
    comments = {
        key: comment for path in (home / "conf" / "config.yaml", *used) for key, comment in comments_of(path)
    }
    lines = []
    for key, line in keyed(printed):
        comment = comments.get(key) if SETTING.match(line) else None  # not beside each entry of a list
        lines.append(line if comment is None else f"{line:<{COLUMN}}  # {comment}")
    return "\n".join(lines)


def is_used(path: Path, printed: str) -> bool:
    """Whether the class and the name that an option file sets are those of a composed configuration."""
    text = path.read_text(encoding="utf-8")
    says = [line.strip() for line in text.splitlines() if line.strip().startswith(("_target_: ", "name: "))]
    composed = {line.strip() for line in printed.splitlines()}
    return all(line in composed for line in says) and bool(says or GLOBAL not in text)


def comments_of(path: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """The comments behind the settings of an option file, by their keys; those of several lines joined."""
    text = path.read_text(encoding="utf-8")
    group = () if GLOBAL in text or path.parent.name == "conf" else (path.parent.name,)
    last: tuple[tuple[str, ...], str] | None = None
    for key, line in keyed(text):
        found = COMMENT.search(line)
        goes_on = last is not None and line.startswith("      ") and line.lstrip().startswith("# ")
        if goes_on and last is not None and found:
            last = (last[0], f"{last[1]} {found[1]}")
            continue
        if last is not None:
            yield last
        last = ((*group, *key), found[1]) if found and key and SETTING.match(line) else None
    if last is not None:
        yield last


def keyed(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The lines of a YAML file, each with the key that it sets or belongs to."""
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        if setting := SETTING.match(line):
            indent = len(setting[1])
            path = [(depth, key) for depth, key in path if depth < indent] + [(indent, setting[2])]
        yield tuple(key for _, key in path), line
