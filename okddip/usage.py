"""What `okddip --help` says ahead of the configuration.

Hydra's own help takes seconds: it looks for subgroups in every option file.
"""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

HEADER = """\
okddip: online knowledge distillation, from Hydra config groups into MLflow.

  okddip [OVERRIDE ...]                    one run
  okddip -m seed=0,1,2 method=okddip,one   a sweep: commas are values to try
  okddip multirun_presets=NAME             a sweep with a name, see below
  okddip task=evaluate checkpoint=...      another task
  okddip --cfg job [OVERRIDE ...]          print the composed configuration
  okddip --hydra-help                      Hydra's own flags and settings, hydra/launcher=joblib for one
"""


def usage(home: Path, arguments: Sequence[str] = ()) -> str:
    """Groups with their options, sweeps with a line each, and the heading of the configuration.

    Args:
        home: where `conf` and `multirun_presets` are.
        arguments: of the command line; a `--config-dir` among them adds options.
    """
    folders = [home / "conf", *config_folders(arguments)]
    groups: dict[str, set[str]] = {}
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


def config_folders(arguments: Sequence[str]) -> list[Path]:
    """The folder that `--config-dir` names, if there is one."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            return [Path(value or following)]
    return []


def first_comment(path: Path) -> str:
    """The first line of an option file that is for readers."""
    comments = (line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    return next((comment for comment in comments if not comment.startswith("@")), "")
