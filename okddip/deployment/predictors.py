"""What a checkpoint holds for its users: predictors, each of which can be had as a plain network."""

import copy
from functools import partial
from typing import Any, cast

from omegaconf import OmegaConf
from torch import Tensor, nn

from okddip.assembly import make
from okddip.methods.base import Method
from okddip.models.group import PeerGroup
from okddip.trust import Trust


def exportable_predictors(method: Method) -> tuple[str, ...]:
    """The predictors that can be had as a plain network: the peers, and the mean of their logits."""
    peers = method.predictors[: method.peers]
    return (*peers, "ensemble") if "ensemble" in method.predictors else peers


def default_predictor(method: Method, history: dict[str, dict[str, float]]) -> str:
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
    """Copy one of `exportable_predictors`: a module in eval mode, images [B, C, H, W] to logits [B, K]."""
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


def rebuild(state: dict[str, Any], trust: Trust, source: object) -> tuple[PeerGroup, Method]:
    """The group and the method that a checkpoint holds, on the CPU.

    Args:
        state: of the checkpoint.
        trust: what its configuration may name.
        source: the checkpoint, for messages.

    Raises:
        ConfigError: its configuration names parts that are not trusted, or that its weights do not fit.
    """
    from okddip.training import checkpoint

    trust.check(state["config"], source)
    config = OmegaConf.create(state["config"])
    make_backbone = partial(
        make, "model", config.model, num_classes=len(state["classes"]), in_channels=state["channels"]
    )
    probe = make_backbone()
    method = make(
        "method",
        config.method,
        feature_dim=probe.feature_dim,
        trunk_channels=probe.trunk_channels,
        epochs=config.trainer.epochs,
    )
    group = PeerGroup(make_backbone, method.peers, method.structure, method.rescale)
    checkpoint.restore(state, group=group, method=method)
    return group, method
