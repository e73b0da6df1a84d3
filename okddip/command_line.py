"""What is read of the command line before Hydra reads it: help, flags, choices of groups, paths and names.

Hydra's own help takes seconds, as it looks for subgroups in every option file.
"""

import argparse
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from textwrap import fill

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from okddip.assembly import CONFIG_HOME
from okddip.errors import ConfigError
from okddip.text import as_override, for_shell_word
from okddip.version import __version__

# Settings that are text however they look: what is typed is not read as a number, a list or a sweep
PLACES = (
    *(
        "checkpoint",
        "dataset.root",
        "dataset.cache_dir",
        "trainer.resume",
        "method.teacher",
        "methods.teacher",
    ),
    *("export.out", "report.out", "benchmark.out", "hydra.run.dir", "hydra.sweep.dir"),
)
NAMES = ("name", "tracking.uri", "tracking.experiment", "report.sweep", "report.run", "report.where")
SWEEPS = ("-m", "--multirun", "hydra.mode=MULTIRUN")
SWEEP_FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\s*\(")  # of Hydra

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
        chosen = parsed(override)
        if chosen is None:
            continue  # Hydra prints the error
        if chosen.is_sweep_override():
            continue
        names = chosen.value()
        if not all(isinstance(name, str) for name in (names if isinstance(names, list) else [names])):
            raise ConfigError(f"{group}={value}: must be an option of conf/{group}, or be left out.")


def overrides_first(arguments: Sequence[str]) -> list[str]:
    """The same command with its flags last: Hydra's parser takes no override after the first flag."""
    with_value = {
        option: action
        for action in get_args_parser()._actions
        for option in action.option_strings
        if action.nargs in (None, "?")
    }
    overrides, flags = [], []
    waiting: argparse.Action | None = None  # a flag that may take the next argument as its value
    for argument in arguments:
        if waiting is not None and (waiting.nargs is None or argument in (waiting.choices or ())):
            flags.append(argument)
            waiting = None
        elif argument.startswith("-"):
            flags.append(argument)
            short = len(argument) > 2 and argument.startswith("--")  # argparse completes these
            names = [name for name in with_value if name == argument or (short and name.startswith(argument))]
            waiting = with_value[names[0]] if names else None
        else:
            overrides.append(argument)
            waiting = None
    return [*overrides, *flags]


def check_flags(arguments: Sequence[str]) -> None:
    """Refuse flags of Hydra that end in a traceback here.

    Raises:
        ConfigError: says what to do instead.
    """
    given = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
    if "--experimental-rerun" in given:
        raise ConfigError(
            "--experimental-rerun: loads a pickle, which may run anything, and this program writes none."
            " `okddip task=report report.run=ID` prints the command that reproduces a run; trainer.resume"
            " resumes one."
        )
    if "--resolve" in given and not given & {"--cfg", "-c", "--help", "-h"}:
        raise ConfigError("--resolve: goes with --cfg: okddip --cfg job --resolve [OVERRIDE ...].")


def as_typed(arguments: Sequence[str]) -> list[str]:
    """Quote the values of places and names for Hydra, where it would read something else or nothing.

    Raises:
        ConfigError: Hydra cannot read the value of another setting; shows it in quotes.
    """
    sweeps = any(
        argument in SWEEPS
        or argument.startswith("multirun_presets=")
        or (argument.startswith("--m") and "--multirun".startswith(argument))  # argparse completes it
        for argument in arguments
    )
    return [
        argument if argument.startswith("-") else override_as_typed(argument, sweeps)
        for argument in arguments
    ]


def override_as_typed(override: str, sweeps: bool) -> str:
    """One override for `as_typed`.

    Args:
        override: of the command line.
        sweeps: whether commas part values to try; else they belong to the value.
    """
    key, equals, value = override.partition("=")
    name = key.lstrip("+")
    if not equals or (CONFIG_HOME / "conf" / name).is_dir():
        return override
    if name not in (*PLACES, *NAMES):
        quoted = f"{key}={as_override(value)}"
        if parsed(override) is None and parsed(quoted) is not None:
            raise ConfigError(
                f"{override}: Hydra cannot read this value. If it is text, quote it for Hydra and for the"
                f" shell: {for_shell_word(quoted)}"
            )
        return override
    whole = parsed(override)
    if sweeps and not Path(value).expanduser().exists():
        in_quotes = value.startswith(("'", '"'))  # Hydra's: commas in them part nothing
        if SWEEP_FUNCTION.match(value) or (whole is not None and (whole.is_sweep_override() or in_quotes)):
            return override
        return f"{key}=" + ",".join(value_as_typed(name, part) for part in value.split(","))
    return f"{key}={value_as_typed(name, value)}"


def value_as_typed(name: str, value: str) -> str:
    """The value of a place or a name in Hydra's grammar, as the text that was typed."""
    if name in PLACES and value.startswith("~"):
        value = str(Path(value).expanduser())
    known = parsed(f"{name}={value}")
    if known is not None and not known.is_sweep_override() and isinstance(known.value(), str | None):
        return value
    return as_override(value)


def parsed(override: str) -> Override | None:
    """What Hydra reads in an override; None if it cannot."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def versions() -> str:
    """The versions of the program and of what it stands on, a line each; nothing heavy is imported."""
    others = [f"{name} {version(name)}" for name in ("hydra-core", "torch", "mlflow")]
    return "\n".join([f"okddip {__version__}", *others])
