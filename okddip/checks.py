"""Check a composed configuration before any part of it is built."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from okddip.assembly import CONFIG_HOME
from okddip.errors import ConfigError, Incompatible, check_number
from okddip.plain_data import plain
from okddip.trust import GLOBAL

# Keys that the program itself reads, and that the command line could delete (`~optimizer.lr`)
REQUIRED_KEYS = (
    *("task", "method", "model", "dataset", "optimizer", "scheduler", "trainer", "tracking", "options"),
    *("seed", "name", "trust", "options.method", "options.model", "options.dataset", "optimizer.lr"),
    *("dataset.name", "dataset.cache_dir", "trainer.epochs", "trainer.resume", "trainer.rerun"),
)
REFERENCE = re.compile(r"\$\{\.*([\w.]+)")  # of an interpolation, the key


def check(config: DictConfig) -> None:
    """Resolve the configuration, and check what its parts do not check themselves.

    Raises:
        ConfigError: an interpolation has no target, nothing reads a key, or a value is not allowed.
    """
    check_keys(config)
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from None
    if missing := OmegaConf.missing_keys(config):
        keys = ", ".join(sorted(missing))
        raise ConfigError(f"{keys}: not given. Add {sorted(missing)[0]}=... to the command.")
    # an escaped \\${...} would be an interpolation when the configuration is read again
    plain(OmegaConf.to_container(config), "", "configuration")
    for key in REQUIRED_KEYS:
        parent, _, name = key.rpartition(".")
        section = OmegaConf.select(config, parent) if parent else config
        if not isinstance(section, DictConfig) or name not in section:
            raise ConfigError(f"{key}: is not in the configuration, and every run needs it.")
    check_ablation(config)
    if config.trainer.rerun and config.trainer.resume is not None:
        raise ConfigError(
            f"trainer.rerun=true, trainer.resume={config.trainer.resume}: the first trains anew, the"
            " second resumes. Leave one out; to resume an interrupted sweep with trainer.rerun=true, give its"
            " command again."
        )
    check_number("seed", config.seed, minimum=0, integer=True)
    if not isinstance(config.name, str) or not config.name.strip():
        raise ConfigError(f"name={config.name}: must be text, the run's name.")


def check_keys(config: DictConfig) -> None:
    """Refuse keys that nothing reads: a typing error in an option file would leave a default in its place.

    Keys of groups whose parts are made (model, trainer...) are refused by those. A key of the user's own is
    fine where the command adds it by `+` or an option file reads it by `${...}`.

    Args:
        config: not resolved yet.

    Raises:
        ConfigError: names the key, and the one that is meant.
    """
    hydra = HydraConfig.get()
    for group in GLOBAL:
        if config.get(group):
            raise ConfigError(
                f"{group}={hydra.runtime.choices.get(group)}: its settings would stand under `{group}`, where"
                " nothing reads them. Its file must begin with the line `# @package _global_`, with no other"
                " comment and no byte order mark before it."
            )
    folders = option_folders()
    known = known_keys(folders)
    own = [path.read_text(encoding="utf-8", errors="replace") for path in option_files(folders[1:])]
    used = {
        *(
            name.lstrip("+").partition("=")[0].rpartition("@")[2]  # GROUP@PLACE=OPTION
            for name in hydra.overrides.task
            if name.startswith("+")
        ),
        *(name for text in (OmegaConf.to_yaml(config), *own) for name in REFERENCE.findall(text)),
    }
    for section, keys in known.items():
        node = OmegaConf.select(config, section) if section else config
        for key in map(str, node) if isinstance(node, DictConfig) else ():
            name = f"{section}.{key}".lstrip(".")
            if key not in keys and not any(f"{other}.".startswith(f"{name}.") for other in used):
                near = nearest(name, config, known)
                raise ConfigError(
                    f"{name}: is not a setting, so nothing would read it."
                    + (f" Did you mean {near}?" if near else "")
                    + f" A key of your own is one that an option file reads by ${{{name}}}."
                )


def option_folders() -> list[Path]:
    """Where option files are: the program's own, then those of `--config-dir`."""
    folders = [
        Path(source.path)
        for source in HydraConfig.get().runtime.config_sources
        if source.schema == "file" and Path(source.path) not in (CONFIG_HOME, CONFIG_HOME / "conf")
    ]
    return [CONFIG_HOME / "conf", *folders]


def option_files(folders: Sequence[Path]) -> list[Path]:
    return [path for folder in folders for path in (*folder.glob("*.yaml"), *folder.glob("*/*.yaml"))]


def known_keys(folders: Sequence[Path]) -> dict[str, set[str]]:
    """The keys that are read at the top (section "") and in sections of which no part is made."""
    top = yaml.safe_load((CONFIG_HOME / "conf" / "config.yaml").read_text(encoding="utf-8"))
    groups = {key for entry in top["defaults"] if isinstance(entry, dict) for key in entry}
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


def nearest(name: str, config: DictConfig, known: Mapping[str, set[str]]) -> str | None:
    """The setting whose name is most like a mistyped one; of several, one in its section, or near the top."""
    keys = {f"{place}.{key}".lstrip("."): key for place in known for key in known[place]}
    keys |= {
        f"{group!s}.{key}": key
        for group, node in config.items()
        if isinstance(node, DictConfig) and group not in known
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


def check_ablation(config: DictConfig) -> None:
    """Check that the method has the switches that an option of the group `ablation` sets.

    Raises:
        Incompatible: it does not.
    """
    hydra = HydraConfig.get()
    if (ablation := hydra.runtime.choices.get("ablation")) is None:
        return
    try:
        method = get_object(config.method._target_)
        constructors = method.__mro__ if isinstance(method, type) else [method]
        parameters = {
            name for constructor in constructors for name in inspect.signature(constructor).parameters
        }
    except Exception:
        return  # building the method raises the error
    added = {key.partition("=")[0] for key in hydra.overrides.task if key.startswith("+")}
    unknown = [key for key in config.method if key not in parameters and not str(key).startswith("_")]
    if unknown and f"+method.{unknown[0]}" not in added:
        raise Incompatible(
            f"ablation={ablation}: sets method.{unknown[0]}, which method={config.options.method} does not"
            " have. Choose method=okddip."
        )
