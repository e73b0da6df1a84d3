"""Which keys of a configuration anything reads, and which one is meant by a key that nothing does."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from okddip.assembly import CONFIG_HOME, options_of
from okddip.errors import ConfigError
from okddip.trust import GLOBAL

REFERENCE = re.compile(r"\$\{\.*([\w.]+)")  # of an interpolation, the key
NO_SUCH_KEY = re.compile(r"Could not override '(.+)'\.\nTo append to your config use \+")
NOTHING_TO_DELETE = re.compile(r"Could not delete from config\. '(.+)' does not exist\.")
SURE = 0.75  # likeness of two names of which one is taken for the other without asking who takes it

Compose = Callable[[Sequence[str]], DictConfig]


class UnknownKey(ConfigError):
    """An override of a setting that the chosen options do not have.

    Attributes:
        key: of the override.
        likeness: of the key to the one that the message names; 0 to 1.
    """

    def __init__(self, key: str, message: str, meant: str | None) -> None:
        super().__init__(message)
        self.key = key
        self.likeness = difflib.SequenceMatcher(None, key, meant or "").ratio()


def check_keys(config: DictConfig, hydra: Any) -> None:
    """Refuse keys that nothing reads: a typing error would leave a default in its place.

    Keys of groups whose parts are made (model, trainer...) are refused by those. A key of the user's own is
    fine where something reads it by `${...}`, or a task or a callback of the user's own gets it.

    Args:
        config: not resolved yet; Hydra's own part in it is not looked at.
        hydra: Hydra's part.

    Raises:
        ConfigError: names the key, and the one that is meant.
    """
    for group in GLOBAL:
        if config.get(group):
            raise ConfigError(
                f"{group}={hydra.runtime.choices.get(group)}: its settings would stand under `{group}`, where"
                " nothing reads them. Its file must begin with the line `# @package _global_`, with no other"
                " comment and no byte order mark before it."
            )
    if others_read(config, hydra):
        return
    folders = option_folders(hydra)
    known = known_keys(folders)
    texts = (OmegaConf.to_yaml(config), OmegaConf.to_yaml(hydra), *texts_of(folders[1:]))
    used = {*added_groups(hydra, folders), *(name for text in texts for name in REFERENCE.findall(text))}
    for section, keys in known.items():
        node = OmegaConf.select(config, section) if section else config
        for key in map(str, node) if isinstance(node, DictConfig) else ():
            name = f"{section}.{key}".lstrip(".")
            if key in (*keys, "hydra") or any(f"{other}.".startswith(f"{name}.") for other in used):
                continue
            near = nearest(name, config, known)
            raise ConfigError(
                f"{name}: is not a setting, so nothing would read it."
                + (f" Did you mean {near}?" if near else "")
                + f" A key of your own is one that an option file reads by ${{{name}}}."
            )


def others_read(config: DictConfig, hydra: Any) -> bool:
    """Whether code of the user's own gets the whole configuration: a task or a callback."""
    callbacks = hydra.get("callbacks") or {}
    targets = [
        OmegaConf.select(config, "task._target_"),
        *(each.get("_target_") for each in callbacks.values()),
    ]
    return any(isinstance(target, str) and not target.startswith("okddip.") for target in targets)


def added_groups(hydra: Any, folders: Sequence[Path]) -> set[str]:
    """Where options of groups stand that overrides add: `+GROUP=OPTION`, `+GROUP@PLACE=OPTION`."""
    names = {name.lstrip("+").partition("=")[0] for name in hydra.overrides.task if name.startswith("+")}
    return {
        name.rpartition("@")[2]
        for name in names
        if "@" in name or any((folder / name).is_dir() for folder in folders)
    }


def option_folders(hydra: Any) -> list[Path]:
    """Where option files are: the program's own, then those of `--config-dir`."""
    folders = [
        Path(source.path)
        for source in hydra.runtime.config_sources
        if source.schema == "file" and Path(source.path) not in (CONFIG_HOME, CONFIG_HOME / "conf")
    ]
    return [CONFIG_HOME / "conf", *folders]


def texts_of(folders: Sequence[Path]) -> list[str]:
    """What the option files in folders say."""
    paths = (path for folder in folders for path in (*folder.glob("*.yaml"), *folder.glob("*/*.yaml")))
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def known_keys(folders: Sequence[Path]) -> dict[str, set[str]]:
    """The keys that are read at the top (section "") and in sections of which no part is made."""
    top, groups = top_of_configuration()
    known = {"": {*top, *groups}, "task": {"_target_"}}
    known |= {section: set(top[section]) for section in ("methods", "options")}
    for path in (path for folder in folders for path in folder.glob("task/*.yaml")):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue  # Hydra says so where the option is chosen
        content = content if isinstance(content, dict) else {}
        if "_target_" in content:  # it stands in its group, as a file without `@package` does
            content = {"task": content}
        known[""].update(content)
        for section, keys in content.items():
            if isinstance(keys, dict):
                known.setdefault(section, set()).update(keys)
    return known


@cache
def top_of_configuration() -> tuple[dict[str, Any], set[str]]:
    """What stands in conf/config.yaml, and the groups that it chooses options of."""
    top = yaml.safe_load((CONFIG_HOME / "conf" / "config.yaml").read_text(encoding="utf-8"))
    return top, {key for entry in top["defaults"] if isinstance(entry, dict) for key in entry}


def nearest(name: str, config: DictConfig, known: Mapping[str, set[str]]) -> str | None:
    """The setting whose name is most like a mistyped one; of several, one in its section, or near the top."""
    sections = [place for place in known if not place or place in config]  # of this task
    keys = {f"{place}.{key}".lstrip("."): key for place in sections for key in known[place]}
    keys |= {
        f"{group!s}.{key}": key
        for group, node in config.items_ex(resolve=False)  # what it refers to may not be there yet
        if isinstance(node, DictConfig) and group not in (*known, "hydra")
        for key in map(str, node)
    }
    section, _, typed = name.rpartition(".")
    found = difflib.get_close_matches(typed, sorted(set(keys.values())), 1)
    likely = [full for full, key in keys.items() if key in found]
    return min(
        likely,
        key=lambda full: (full.rpartition(".")[0] != section, full.count("."), full),
        default=None,
    )


def explain_composition() -> None:
    """Let Hydra name the key or the option that was meant where it would advise to add what was mistyped."""
    original = ConfigLoaderImpl.load_configuration
    if hasattr(original, "__wrapped__"):
        return

    def load_configuration(
        self: ConfigLoaderImpl, config_name: str | None, overrides: list[str], *given: Any, **named: Any
    ) -> DictConfig:
        def compose(others: Sequence[str]) -> DictConfig:
            return original(self, config_name, list(others), *given, **named)

        try:
            return compose(overrides)
        except ConfigCompositionException as error:
            if (explained := explanation(error, overrides, compose)) is None:
                raise
            raise explained from None

    load_configuration.__wrapped__ = original  # type: ignore[attr-defined]
    ConfigLoaderImpl.load_configuration = load_configuration  # type: ignore[method-assign]


def explanation(error: Exception, overrides: Sequence[str], compose: Compose) -> ConfigError | None:
    """What to say of a configuration that does not compose; None where Hydra's message is right."""
    if isinstance(error, MissingConfigException):
        return missing_option(error, overrides)
    message = str(error)
    match = NO_SUCH_KEY.match(message) or NOTHING_TO_DELETE.match(message)
    if match is None:
        return None
    key = match[1]
    if key.startswith("hydra."):
        return None
    wrong = [each for each in overrides if each.lstrip("~").partition("=")[0] == key]
    others = [each for each in overrides if each not in wrong]
    try:
        config = compose(others)
    except Exception as other:
        return explanation(other, others, compose)
    near, takes = meant(key, config)
    sign, equals, value = "~" * message.startswith("Could not delete"), *wrong[0].partition("=")[1:]
    if takes and not sign:
        message = f"{key}: is not in the configuration, but {takes} takes it: +{wrong[0]}"
        return UnknownKey(key, message, key)
    message = f"{wrong[0]}: {key} is not a setting of the chosen options."
    message += f" Did you mean {sign}{near}{equals}{value}?" if near else " okddip --help lists all settings."
    return UnknownKey(key, message, near)


def meant(key: str, config: DictConfig) -> tuple[str | None, str | None]:
    """The setting that a mistyped key stands for; or what takes the key that the configuration lacks."""
    section, _, typed = key.rpartition(".")
    node = OmegaConf.select(config, section) if section else None
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if isinstance(node, DictConfig) and isinstance(target, str):
        if near := difflib.get_close_matches(typed, map(str, node), 1, SURE):
            return f"{section}.{near[0]}", None
        try:
            options = options_of(get_object(target))
        except Exception:  # names nothing: it is refused where it is made
            options = set()
        if options is None or typed in options:
            return None, target
        if near := difflib.get_close_matches(typed, {*options, *map(str, node)}, 1):
            return f"{'' if near[0] in node else '+'}{section}.{near[0]}", None
    return nearest(key, config, known_keys([CONFIG_HOME / "conf"])), None


# options that come with packages of the extra `sweep`
OF_EXTRAS = {
    "hydra/launcher": ("joblib", "submitit_local", "submitit_slurm"),
    "hydra/sweeper": ("optuna",),
}


def missing_option(error: MissingConfigException, overrides: Sequence[str]) -> ConfigError | None:
    """What to say of an override `GROUP=OPTION` without such an option."""
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    given = {each.lstrip("+").partition("=")[0].partition("@")[0] for each in overrides}
    options = [name for name in error.options or () if name]
    if group not in given or not options:
        return None
    if option in OF_EXTRAS.get(group, ()):
        return ConfigError(
            f"{group}={option}: needs packages of the extra `sweep`. Install them in a checkout of okddip"
            " with pip install '.[sweep]'."
        )
    near = difflib.get_close_matches(option, options, 1)
    return ConfigError(
        f"{group}={option}: there is no such option."
        + (f" Did you mean {group}={near[0]}?" if near else "")
        + f" There are {', '.join(sorted(options))}."
    )
