"""What a checkpoint holds for its users: predictors, each of which can be had as a plain network."""

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from torch import Tensor, nn

from okddip.errors import ConfigError
from okddip.methods.base import Method
from okddip.models.group import PeerGroup
from okddip.training import checkpoint


def open_checkpoint(config: DictConfig) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that the setting `checkpoint` names, and what it holds.

    Raises:
        ConfigError: it is not there, or no checkpoint.
    """
    path = checkpoint.find("checkpoint", str(config.checkpoint), config.tracking.get("uri"))
    state = checkpoint.load(path)
    checkpoint.warn_of_other_version(state, path)
    return path, state


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


def networks(method: Method) -> tuple[str, ...]:
    """The predictors that can be had as a plain network: the peers, and the mean of their logits."""
    peers = method.predictors[: method.peers]
    return (*peers, "ensemble") if "ensemble" in method.predictors else peers


def default_network(method: Method, history: dict[str, dict[str, float]]) -> str:
    """The predictor to keep: the leader or the student, elsewhere the best peer.

    Args:
        history: of the checkpoint. Peers are judged by the validation set; without one the first is taken,
            for to choose by the test set would flatter the choice.
    """
    peers = method.predictors[: method.peers]
    if method.primary in peers:
        return method.primary
    last = history.get("last", {})
    scores = {peer: last[f"val/{peer}/top1"] for peer in peers if f"val/{peer}/top1" in last}
    return max(scores, key=scores.__getitem__) if scores else peers[0]


def extract(group: PeerGroup, method: Method, predictor: str) -> nn.Module:
    """Copy one of `networks` out of a group: a module in eval mode, images [B, C, H, W] to logits [B, K]."""
    if predictor != "ensemble":
        return group.extract(method.predictors.index(predictor)).eval()
    members = copy.deepcopy(group)
    members.peers = cast(nn.ModuleList, members.peers[: method.auxiliary])
    members.rescale = False  # only backward knows a difference
    return Ensemble(members).eval()


class Ensemble(nn.Module):
    """The mean of the logits of all peers of a group; branches compute their trunk once."""

    def __init__(self, group: PeerGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, K]."""
        return self.group(images).logits.mean(0)
