"""The command that reproduces a run: overrides that compose to its very configuration."""

import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from okddip.assembly import PEERS, compose_networks
from okddip.errors import ConfigError
from okddip.older_versions import updated
from okddip.plain_data import plain
from okddip.tasks.report.runs import LENGTHS
from okddip.text import as_override, for_shell, for_shell_word, okddip_command
from okddip.trust import PARTS, Trust

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

SWITCHES = ("trainer.resume", "trainer.rerun")  # how a run was resumed makes it no other run
UNNAMED_GROUPS = ("optimizer", "scheduler", "trainer", "tracking")  # `options` names the others
ABSENT = object()


def reproducing_command(client: "MlflowClient", run_id: str, trust: Trust) -> str:
    """The command line of a run, below a line on the run itself.

    The command of a sweep's job is not the one that was typed, so the overrides are found anew: the options
    of the groups, then each value that still differs, until the composed configuration equals the
    `config.yaml` of the run. Composes as the program that runs now does. The parent of a sweep has the
    command that was typed.

    Each line is a comment or calls this program and nothing else, whoever wrote to the store.

    Args:
        client: of the store.
        run_id: of the run.
        trust: what the configuration in the store may name.

    Raises:
        ConfigError: there is no such run, it has no configuration, or one that does not compose here; what is
            stored as the command of a sweep calls something else; or the configuration names parts that are
            not trusted, which somebody who pastes the command would run.
    """
    from mlflow.exceptions import MlflowException

    run_id = run_id.removeprefix("runs:/")
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise ConfigError(f"report.run={run_id}: {str(error.message).strip()}.") from None
    typed = okddip_command(run.data.tags.get("command", ""))
    if run.data.tags.get("kind") == "sweep":
        if typed is None:
            raise ConfigError(
                f"report.run={run_id}: what the store has as the command of this sweep is no call of okddip"
                " with overrides. Its child runs have commands of their own."
            )
        if code := words_that_name_code(typed):
            raise ConfigError(
                f"report.run={run_id}: the command that the store has for this sweep names code or option"
                f" files ({for_shell(code)}), which whoever pastes it would run, so it is not printed. If"
                " they are your own, give --config-dir here too. Its child runs have commands of their own."
            )
        return f"{comment(run)}\n{for_shell(typed)}"  # all of its jobs
    if run.data.tags.get(LENGTHS):
        raise ConfigError(
            f"report.run={run_id}: an older version lengthened this run, although its learning rate or ramp"
            " depend on its length, so no single command reproduces it."
        )
    wanted = stored_configuration(client, run_id, typed)
    folders = config_folders(typed or [])
    try:
        command = for_shell(["okddip", *folders, *find_overrides(wanted)])
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra raises all three
        hint = f" It was started with {for_shell(folders)}: give that here too." if folders else ""
        raise ConfigError(f"report.run={run_id}: cannot be composed here. {error}{hint}") from None
    trust.check(wanted, f"report.run={run_id}: config.yaml")  # a command that names code runs it
    return f"{comment(run)}\n{command}"


def words_that_name_code(words: Sequence[str]) -> list[str]:
    """The words of a command that let it run code from elsewhere, but for the user's own option folders."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    own = {Path(source.path).absolute() for source in sources if source.schema == "file"}
    folders = [word.removeprefix("--config-dir=") for word in config_folders(words) if word != "--config-dir"]
    found = [folder for folder in folders if Path(folder).expanduser().absolute() not in own]
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if (
            "_target_" in word
            or key.startswith(("hydra.searchpath", "hydra.callbacks", "hydra.job_logging"))
            or re.match(r"--config-(path|name)|-c[pn]\b", word)
        ):
            found.append(word)
    return found


def comment(run: "Run") -> str:
    """The line on a run: its name, its ID, and the code that it was trained with."""
    # quoted, since zsh knows no comments at its prompt
    line = f"# {for_shell_word(str(run.info.run_name))}, {for_shell_word(run.info.run_id)}"
    if commit := run.data.tags.get("mlflow.source.git.commit"):
        line += f", commit {for_shell_word(commit)}"
    if changed := run.data.tags.get("uncommitted"):
        line += f" with uncommitted changes in {for_shell(changed.split())}"
    return line


def stored_configuration(client: "MlflowClient", run_id: str, typed: list[str] | None) -> dict[str, Any]:
    """The configuration of a run in a store.

    Args:
        client: of the store.
        run_id: of the run.
        typed: the command that started it, if the store has it, for messages.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    from mlflow.exceptions import MlflowException

    source = f"report.run={run_id}: config.yaml"
    try:
        with tempfile.TemporaryDirectory() as folder:
            text = Path(client.download_artifacts(run_id, "config.yaml", folder)).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: cannot be read ({error}).") from None
    except (MlflowException, OSError):
        known = f" It was started with: {for_shell(typed)}" if typed else ""
        raise ConfigError(f"report.run={run_id}: this run keeps no config.yaml.{known}") from None
    return parse_configuration(text, source)


def parse_configuration(text: str, source: str) -> dict[str, Any]:
    """The configuration of a run, which anybody may have written: plain data, with the groups of a run.

    Raises:
        ConfigError: it is none.
    """
    try:
        # a node that stands for another may make billions of few: what a run writes has none
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ConfigError(f"{source}: holds YAML aliases, as no run writes them.")
        content = OmegaConf.to_container(OmegaConf.create(text))
    except ConfigError:
        raise
    except Exception as error:  # there is hardly one that a tag such as !!int cannot raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{source}: cannot be read ({reason}).") from None
    wanted = plain(content, "", source)
    groups = (*PARTS, "tracking", "options")
    if not isinstance(wanted, dict) or not all(isinstance(wanted.get(group), dict) for group in groups):
        raise ConfigError(f"{source}: is not the configuration of a run of this program.")
    for group, option in wanted["options"].items():
        if not isinstance(option, str):
            raise ConfigError(f"{source}: options.{group}={option}: must be the name of an option.")
        if ".." in option.split("/"):
            raise ConfigError(f"{source}: names an option outside of the folders of options.")
    wanted = updated(wanted)
    wanted.setdefault("trust", [])  # of a run before there was such a key
    return wanted


def find_overrides(wanted: Mapping[str, Any], ignored: Collection[str] = SWITCHES) -> list[str]:
    """Overrides of the default configuration that compose to `wanted`, apart from the keys in `ignored`.

    Raises:
        ConfigError: there are none.
        HydraException: an option that `wanted` names is not there.
    """
    defaults = compose_resolved([])["options"]
    chosen = [
        f"{group}={option}"
        for group, option in wanted["options"].items()
        if option != defaults.get(group) and not (group == "model" and wanted["model"].get(PEERS))
    ]
    chosen += peers_overrides(wanted)
    for group in UNNAMED_GROUPS:
        chosen += option_with_target(group, wanted, chosen)
    return complete_overrides(wanted, chosen, ignored)


def peers_overrides(wanted: Mapping[str, Any]) -> list[str]:
    """The override that names the networks of a configuration, where its peers differ."""
    peers = wanted["model"].get(PEERS)
    return [f"model.{PEERS}={as_override(peers)}"] if peers else []


def complete_overrides(
    wanted: Mapping[str, Any], given: Sequence[str], ignored: Collection[str] = ()
) -> list[str]:
    """The overrides `given`, and one for each value in which they do not compose to `wanted`.

    Raises:
        ConfigError: there is none for a value.
    """
    chosen = list(given)
    while True:
        found = differences(wanted, compose_resolved(chosen))
        different = sorted((each for each in found if each[0] not in ignored), key=depth)
        if not different:
            return chosen
        key, sign, value = different[0]
        override = f"~{key}" if value is ABSENT else f"{sign}{key}={as_override(value)}"
        if override in chosen:
            raise ConfigError(f"{key}={value}: no override composes to this value of the run.")
        chosen = [each for each in chosen if not each.startswith(f"{key}=")]  # the later one would win
        chosen.append(override)


def depth(difference: tuple[str, str, Any]) -> tuple[bool, int]:
    """Upper keys first: lower ones refer to them. The name follows from all."""
    key = difference[0]
    return key == "name", key.count(".")


def option_with_target(group: str, wanted: Mapping[str, Any], chosen: Sequence[str]) -> list[str]:
    """The override that chooses the option of a group with the wanted `_target_`, if another is chosen."""
    target = wanted[group].get("_target_")
    if compose_resolved(chosen)[group].get("_target_") == target:
        return []
    for option in GlobalHydra.instance().config_loader().get_group_options(group):
        if compose_resolved([*chosen, f"{group}={option}"])[group].get("_target_") == target:
            return [f"{group}={option}"]
    return []


def compose_resolved(arguments: Sequence[str]) -> dict[str, Any]:
    """The resolved configuration that overrides compose to, in the program as it runs."""
    hydra = HydraConfig.instance()
    before = hydra.cfg
    config = compose("config", list(arguments), return_hydra_config=True)
    hydra.set_config(config)  # for ${hydra:...}
    try:
        with open_dict(config):
            del config["hydra"]
        compose_networks(config)
        return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    finally:
        hydra.cfg = before


def differences(wanted: Any, found: Any, key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Key, sign of the override (`+` adds a key) and wanted value of each leaf that differs."""
    if isinstance(wanted, Mapping) and wanted and (found is ABSENT or isinstance(found, Mapping)):
        theirs: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
        for name in dict.fromkeys([*wanted, *theirs]):
            inner = f"{key}.{name}" if key else str(name)
            yield from differences(wanted.get(name, ABSENT), theirs.get(name, ABSENT), inner)
    elif not (wanted == found and type(wanted) is type(found)):
        yield key, "+" if found is ABSENT else "", wanted


def config_folders(words: Sequence[str]) -> list[str]:
    """`--config-dir` of a command line: where the user's own option files are."""
    found = []
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word in ("--config-dir", "-cd"):
            found += ["--config-dir", following]
        elif word.startswith("--config-dir="):
            found.append(word)
    return found
