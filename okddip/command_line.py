"""What is read of the command line before Hydra reads it: help, choices of groups, the filter of a report.

Hydra's own help takes seconds, as it looks for subgroups in every option file.
"""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from okddip.assembly import CONFIG_HOME
from okddip.errors import ConfigError

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
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        name, _, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            return [Path(value or following)]
    return []


def first_comment(path: Path) -> str:
    """The first comment of an option file, without Hydra's `@package` line."""
    comments = (line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    return next((comment for comment in comments if not comment.startswith("@")), "")


def check_choices(overrides: list[str]) -> None:
    """Refuse `group=null` and `group=[1]`, for which Hydra prints a traceback.

    Raises:
        ConfigError: names the group and what is allowed.
    """
    for override in overrides:
        group, _, value = override.lstrip("+").partition("=")
        if not group or not (CONFIG_HOME / "conf" / group).is_dir():
            continue
        try:
            chosen = OverridesParser.create().parse_override(override)
        except HydraException:
            continue  # Hydra prints the error
        if chosen.is_sweep_override():
            continue
        names = chosen.value()
        if not all(isinstance(name, str) for name in (names if isinstance(names, list) else [names])):
            raise ConfigError(f"{group}={value}: must be an option of conf/{group}, or be left out.")


def quote_report_filter(overrides: Sequence[str]) -> list[str]:
    """Quote the value of `report.where` for Hydra, if it was typed without Hydra's quotes."""
    quoted = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "report.where":
            try:
                OverridesParser.create().parse_override(override)
            except HydraException:
                from okddip.tasks.report.reproduce import as_override

                override = f"{key}={as_override(value)}"
        quoted.append(override)
    return quoted
