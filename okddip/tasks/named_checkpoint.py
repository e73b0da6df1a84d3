"""The checkpoint that a command names, and what the command may set beside it."""

from collections.abc import Collection
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from okddip.errors import ConfigError
from okddip.run.references import find_checkpoint
from okddip.training import checkpoint


def open_checkpoint(config: DictConfig) -> tuple[str, dict[str, Any]]:
    """The checkpoint that the setting `checkpoint` names, and what it holds.

    Returns:
        `runs:/ID` where that was given (where MLflow puts the file may be gone soon), else the file's path.

    Raises:
        ConfigError: it is not there, or no checkpoint.
    """
    reference = str(config.checkpoint)
    path = find_checkpoint("checkpoint", reference, config.tracking.get("uri"))
    state = checkpoint.load(path)
    name = reference if reference.startswith("runs:/") else str(path)
    checkpoint.warn_of_other_version(state, name)
    return name, state


def chosen_keys(task: str, settled: Collection[str]) -> set[str]:
    """Keys and groups that the command line sets: `dataset` for dataset=digits, `trainer.device`...

    Args:
        task: for the message.
        settled: groups that a checkpoint settles.

    Raises:
        ConfigError: the command line sets one of those.
    """
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    keys = {override.key_or_group for override in overrides}
    for key in sorted(keys):
        if key.partition(".")[0] in settled and key != "methods.teacher":
            raise ConfigError(
                f"{key}: is settled by the checkpoint and not read by task={task}; leave it out."
            )
    return keys
