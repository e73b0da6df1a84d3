"""What is read of the command line before Hydra reads it: flags, words, choices, paths and names."""

import argparse
import difflib
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
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
LISTS = ("method.teacher", "methods.teacher")  # places that may be several: [a.pt,b.pt]
NAMES = ("name", "tracking.uri", "tracking.experiment", "report.sweep", "report.run", "report.where")
# Whose settings a flag of another program may mean; of settings with one name that of the first
GROUPS_OF_SETTINGS = ("trainer", "optimizer", "method", "scheduler")
SWEEPS = ("-m", "--multirun", "hydra.mode=MULTIRUN")
SWEEP_FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\s*\(")  # of Hydra


def for_hydra(arguments: Sequence[str]) -> list[str]:
    """The command line as Hydra is to read it: overrides first, values of places and names quoted.

    Raises:
        ConfigError: a flag, a word or a choice is not one, with what was meant.
    """
    check_flags(arguments)
    overrides, flags = overrides_and_flags(arguments)
    check_words(overrides, config_folders(flags))
    words = as_typed([*overrides, *flags])
    check_choices(words)
    return words


def config_folders(arguments: Sequence[str]) -> list[Path]:
    """The folder that `--config-dir` names, if there is one."""
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        name, _, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            return [Path(value or following)]
    return []


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


def overrides_and_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of a command, and its flags with their values: Hydra's parser takes these last alone."""
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
    return overrides, flags


def check_flags(arguments: Sequence[str]) -> None:
    """Refuse flags that there are not, and those of Hydra that end in a traceback here.

    Raises:
        ConfigError: says what to do instead.
    """
    given = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
    flags = [flag for action in get_args_parser()._actions for flag in action.option_strings]
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        name, equals, value = argument.partition("=")
        if not name.startswith("-") or any(
            flag == name or (flag.startswith("--") and flag.startswith(name))  # argparse completes it
            for flag in flags
        ):
            continue
        if not equals and "=" not in following and not following.startswith("-"):
            value = following
        key = setting_of_flag(name)
        raise ConfigError(
            f"{name}: is no flag. "
            + (f"Did you mean {key}={value or '...'}? " if key else "")
            + "Settings are given as KEY=VALUE, without dashes; okddip --help lists them and the flags."
        )
    if "--experimental-rerun" in given:
        raise ConfigError(
            "--experimental-rerun: loads a pickle, which may run anything, and this program writes none."
            " `okddip task=report report.run=ID` prints the command that reproduces a run; trainer.resume"
            " resumes one."
        )
    if "--resolve" in given and not given & {"--cfg", "-c", "--help", "-h"}:
        raise ConfigError("--resolve: goes with --cfg: okddip --cfg job --resolve [OVERRIDE ...].")


def setting_of_flag(flag: str) -> str | None:
    """The setting or the group that other programs have as a flag: trainer.batch_size for --batch-size."""
    folders = sorted(path.name for path in (CONFIG_HOME / "conf").iterdir() if path.is_dir())
    typed = flag.lstrip("-").replace("-", "_").removeprefix("num_")
    keys = {"seed": "seed", "name": "name", **{group: group for group in folders}}
    for group in reversed(GROUPS_OF_SETTINGS):
        for path in (CONFIG_HOME / "conf" / group).glob("*.yaml"):
            names = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            keys |= {name: f"{group}.{name}" for name in names if not name.startswith("_")}
    keys |= {full: full for full in list(keys.values())}
    near = difflib.get_close_matches(typed, sorted(keys), 1)
    return keys[near[0]] if near else None


def check_words(overrides: Sequence[str], folders: Sequence[Path] = ()) -> None:
    """Refuse words that are no overrides, for which Hydra would print its grammar.

    Args:
        overrides: of a command line, without its flags.
        folders: of options beside the program's own.

    Raises:
        ConfigError: shows the override that was meant.
    """
    for number, word in enumerate(overrides):
        key, equals, _ = word.partition("=")
        if word.startswith("~") or (equals and key):
            continue
        before, after = overrides[max(number - 1, 0) : number], overrides[number + 1 : number + 3]
        if key and after and after[0].startswith("="):  # lr = 0.1, lr =0.1
            raise spaces(key, "".join(after if after[0] == "=" else after[:1])[1:])
        if before and before[0].endswith("="):  # lr= 0.1
            raise spaces(before[0][:-1], word)
        raise ConfigError(f"{word or repr(word)}: is no override. {meaning_of(word, folders)}")


def spaces(key: str, value: str) -> ConfigError:
    meant = for_shell_word(f"{key}={value}")
    return ConfigError(f"{key} = {value}: an override has no spaces around its equals sign: {meant}")


def meaning_of(word: str, folders: Sequence[Path]) -> str:
    """What somebody may have wanted to say with a word that is no override."""
    if word == "help":
        return "okddip --help lists options and settings."
    if word == "train":
        return "Training is what okddip does without a task=...: leave the word out."
    if word in ("sweep", "multirun"):
        return "A sweep is okddip -m KEY=VALUE,VALUE."
    options = {
        path.stem: path.parent.name
        for folder in (CONFIG_HOME / "conf", CONFIG_HOME, *folders)
        for path in sorted(folder.glob("*/*.yaml"))
    }
    if near := difflib.get_close_matches(word, options, 1):
        return f"Did you mean {options[near[0]]}={near[0]}?"
    return "Settings and options are given as KEY=VALUE; okddip --help lists them."


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
    typed = [
        argument if argument.startswith("-") else override_as_typed(argument, sweeps)
        for argument in arguments
    ]
    flags = next((place for place, word in enumerate(typed) if word.startswith("-")), len(typed))
    return [*typed[:flags], *implied_by_peers(typed), *typed[flags:]]


def implied_by_peers(arguments: Sequence[str]) -> list[str]:
    """What follows from `model.peers=[...]` and is not given: how many peers there are, and that they share
    nothing."""
    given = {argument.lstrip("+").partition("=")[0]: argument for argument in arguments}
    chosen = parsed(given.get("model.peers", ""))
    if chosen is None:
        return []
    value = chosen.value()
    lists = value.list if isinstance(value, ChoiceSweep) else [value]
    counts = {len(names) for names in lists if isinstance(names, list)}
    implied = {"method.structure": "network"} if counts else {}
    if len(counts) == 1:  # else no one number fits
        implied["method.peers"] = str(*counts)
    return [f"{key}={value}" for key, value in implied.items() if key not in given]


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
    if sweeps and not Path(value).expanduser().exists() and not is_list(name, value):
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
    is_one = known is not None and not known.is_sweep_override() and isinstance(known.value(), str | None)
    return value if is_one or is_list(name, value) else as_override(value)


def is_list(name: str, value: str) -> bool:
    """Whether a value is a list of places, for a setting that takes several; no place of such a name."""
    known = parsed(f"{name}={value}") if name in LISTS and not Path(value).exists() else None
    items = None if known is None or known.is_sweep_override() else known.value()
    return isinstance(items, list) and all(isinstance(item, str) for item in items)


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
