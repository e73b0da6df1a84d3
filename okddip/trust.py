"""Which classes a file may name as its parts, where anybody may have written the file.

A checkpoint or an export must be plain data (`plain`) and name its classes from a list (`Trust`), and both
are checked before anything is imported for it.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig

from okddip.assembly import CONFIG_HOME
from okddip.errors import ConfigError
from okddip.plain_data import NotTrusted

PARTS = ("method", "model", "dataset", "optimizer", "scheduler", "trainer")  # groups that a file brings along
GLOBAL = ("experiment", "ablation", "multirun_presets")  # groups whose options set keys of any group
# one of several networks is a model as a single one is
NETWORK = re.compile(r"^model\.networks\.\d+(?=\.|$)")
MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def targets(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every `_target_` in a configuration, with the key that it stands under."""
    if isinstance(node, Mapping | DictConfig):
        if "_target_" in node:
            yield key, node["_target_"]
        for name, value in node.items():
            if f"{key}.{name!s}" not in (".task", ".tracking"):  # the command has its own
                yield from targets(value, f"{key}.{name!s}".lstrip("."))
    elif isinstance(node, list | ListConfig):
        for index, value in enumerate(node):
            yield from targets(value, f"{key}.{index}")


@dataclass(frozen=True)
class Trust:
    """What a file that anybody may have written can name as its parts.

    The targets in the program's own option files, each under its key; optimizers of `torch.optim`; within a
    model or a method, modules of `torch.nn`; and what the user calls his own.

    Attributes:
        modules: that the user has named: what is defined in them may be called.
        targets: by group, what the present command and the user's own option files name.
    """

    modules: frozenset[str] = frozenset()
    targets: Mapping[str, Collection[str]] = field(default_factory=dict)

    def check(self, config: Mapping[str, Any], source: object) -> None:
        """See that each `_target_` of a plain configuration may be called; what may not is not imported.

        Args:
            config: with groups at its top.
            source: the file, for messages.

        Raises:
            NotTrusted: names the first that may not, and what to do if it is the user's own.
        """
        for key, target in targets(config):
            if not isinstance(target, str) or not MODULE.fullmatch(target):
                raise NotTrusted(f"{source}: {key}._target_={target}: is no name of a class or function.")
            home, place = None, NETWORK.sub("model", key)
            if not (
                target in package_targets().get(place, ())
                or target in self.targets.get(place.partition(".")[0], ())
                or is_torchs_own(place, target)
                or (home := self._home(target)) in self.modules
            ):
                module = home or own_module(target)
                root = module.partition(".")[0]
                own = root != "okddip" and root not in sys.stdlib_module_names
                raise NotTrusted(
                    f"{source}: {key}._target_={target}: is no part that this program offers there, and is"
                    " not called: anybody may have written the file."
                    + (f" If it is your own code, say so by trust=[{module}]." if own else "")
                )
        for key in positional_arguments(config):
            raise NotTrusted(f"{source}: {key}: arguments without names are not taken from a file.")

    def _home(self, target: str) -> str | None:
        """The trusted module in which a target is defined; if it is defined in another, that one's name.

        Raises:
            ConfigError: a module that the user has named cannot be imported.
        """
        near = [module for module in self.modules if target.startswith(f"{module}.")]
        if not near:
            return None
        module = max(near, key=len)
        try:
            found: Any = importlib.import_module(module)
        except Exception as error:  # of whatever the module does
            raise ConfigError(f"trust={module}: cannot be imported ({error}).") from error
        for name in target.removeprefix(f"{module}.").split("."):
            found = None if name.startswith("_") else inspect.getattr_static(found, name, None)
            if isinstance(found, classmethod | staticmethod):
                found = found.__func__
            if found is None or isinstance(found, ModuleType):
                return None
        defined = getattr(found.func if isinstance(found, partial) else found, "__module__", None)
        if not isinstance(defined, str):
            return None
        # a package may offer what its own modules define
        return next((own for own in self.modules if f"{defined}.".startswith(f"{own}.")), defined)


def positional_arguments(node: Any, key: str = "") -> Iterator[str]:
    """The keys of all `_args_` in a plain configuration: what they mean cannot be told by their names."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            inner = f"{key}.{name}".lstrip(".")
            if name == "_args_":
                yield inner
            yield from positional_arguments(value, inner)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from positional_arguments(value, f"{key}.{index}")


def trust_in(modules: Any) -> Trust:
    """Trust in modules that the user names.

    Raises:
        ConfigError: no list of names.
    """
    if not isinstance(modules, Sequence | ListConfig) or isinstance(modules, str):
        modules = [modules]
    for module in modules:
        if not isinstance(module, str) or not MODULE.fullmatch(module):
            raise ConfigError(f"trust={module}: must be a list of modules, such as trust=[mine,mine.models].")
    return Trust(frozenset(modules))


def trust_of(config: DictConfig) -> Trust:
    """What the user of a command calls his own.

    It is what `trust` names, what the option files in a folder of `--config-dir` name, and what the command
    itself composes.

    Args:
        config: of the command; never one that a file brings along.

    Raises:
        ConfigError: `trust` is no list of names.
    """
    named: dict[str, set[str]] = {}
    for key, target in targets({group: config.get(group) for group in PARTS}):
        if isinstance(target, str):
            named.setdefault(key.partition(".")[0], set()).add(target)
    if HydraConfig.initialized():
        for source in HydraConfig.get().runtime.config_sources:
            folder = Path(source.path)
            if source.schema == "file" and folder not in (CONFIG_HOME, CONFIG_HOME / "conf"):
                for key, found in targets_in(folder).items():
                    named.setdefault(key.partition(".")[0], set()).update(found)
    return Trust(trust_in(config.get("trust", [])).modules, named)


def targets_in(folder: Path) -> dict[str, set[str]]:
    """What the option files of a folder name as their parts: targets by key, read and not resolved."""
    found: dict[str, set[str]] = {}
    for path in [*folder.glob("config.yaml"), *folder.glob("*/*.yaml"), *folder.glob("*/*/*.yaml")]:
        group = path.relative_to(folder).parts[0]
        if group not in ("config.yaml", *PARTS, *GLOBAL):
            continue
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue  # Hydra says so where the option is chosen
        for key, target in targets(content, group if group in PARTS else ""):
            if key.partition(".")[0] in PARTS and isinstance(target, str):
                found.setdefault(key, set()).add(target)
    return found


@cache
def package_targets() -> dict[str, set[str]]:
    """What the program's own option files name, by key."""
    return targets_in(CONFIG_HOME / "conf")


def is_torchs_own(key: str, target: str) -> bool:
    """Whether a target is an optimizer of `torch.optim` or, within a model or method, of `torch.nn`."""
    import torch

    package, _, name = target.rpartition(".")
    if (key, package) == ("optimizer", "torch.optim"):
        optimizer = vars(torch.optim).get(name)
        return isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)
    if package == "torch.nn" and key.startswith(("model.", "method.")):
        module = vars(torch.nn).get(name)
        return isinstance(module, type) and issubclass(module, torch.nn.Module)
    return False


def own_module(target: str) -> str:
    """The module that a target most likely stands in: what comes before its class or function."""
    *parts, _ = target.split(".")
    while len(parts) > 1 and parts[-1][0].isupper():
        parts.pop()
    return ".".join(parts) or target
