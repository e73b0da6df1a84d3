"""What a checkpoint holds for its users: predictors, each of which can be had as a plain network."""

import copy
from collections.abc import Sequence
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from okddip.assembly import backbone_factories, make
from okddip.methods.base import Method
from okddip.models.backbone import dimensions_of
from okddip.models.group import PeerGroup
from okddip.trust import Trust


def exportable_predictors(method: Method) -> tuple[str, ...]:
    """The predictors that can be had as a plain network: peers, their averages and ensembles."""
    peers = method.predictors[: method.peers]
    mean = ("ensemble",) if "ensemble" in method.predictors else ()
    combination = (method.combination,) if method.combination else ()
    return (*peers, *mean, *combination, *method.averaged)


def with_models(method: Method, models: Sequence[str] | None) -> dict[str, str]:
    """What tables call each predictor: where peers differ, `peer0 (resnet8)`.

    Args:
        models: of the peers, where they differ.
    """
    peers = dict(zip(method.predictors[: method.peers], models or (), strict=False))
    known = {name: peers.get(name.removeprefix("ema/")) for name in method.measured}
    return {name: f"{name} ({model})" if model else name for name, model in known.items()}


def default_predictor(method: Method, history: dict[str, dict[str, float]]) -> str:
    """The predictor to keep: the leader or the student, elsewhere the best peer.

    Args:
        history: of the checkpoint. Peers are judged by the validation set; without one the first is taken,
            for to choose by the test set would flatter the choice.
    """
    peers = method.averaged if method.primary == "ema/mean" else method.predictors[: method.peers]
    if method.primary in peers:
        return method.primary
    last = history.get("last", {})
    scores = {peer: last[f"val/{peer}/top1"] for peer in peers if f"val/{peer}/top1" in last}
    return max(scores, key=scores.__getitem__) if scores else peers[0]


def extract(group: PeerGroup, method: Method, predictor: str) -> nn.Module:
    """Copy one of `exportable_predictors`: a module in eval mode, images [B, C, H, W] to logits [B, K]."""
    if predictor == method.combination:
        return Combination(copy.deepcopy(group), copy.deepcopy(method)).eval()
    if predictor in method.averaged:
        return cast(PeerGroup, group.averages[0].group).extract(method.averaged.index(predictor)).eval()
    if predictor != "ensemble":
        return group.extract(method.predictors.index(predictor)).eval()
    members = copy.deepcopy(group)
    members.peers = cast(nn.ModuleList, members.peers[: method.auxiliary])
    members.rescale = members.maps = False  # only the method and backward know a difference
    members.averages = ()
    return Ensemble(members).eval()


class Ensemble(nn.Module):
    """The mean of the logits of all peers of a group; branches compute their trunk once."""

    def __init__(self, group: PeerGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, K]."""
        return self.group(images).logits.mean(0)


class Combination(nn.Module):
    """An ensemble of all peers of a group by what their method has learned."""

    def __init__(self, group: PeerGroup, method: Method) -> None:
        super().__init__()
        self.group = group
        self.group.averages = ()  # which would be computed, and which nothing here reads
        self.method = method

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, K]."""
        return self.method.combine(self.group(images))


def build_group(parts: DictConfig, epochs: int, **shape: int) -> tuple[PeerGroup, Method]:
    """The group and the method that a configuration's `model` and `method` describe, untrained.

    Args:
        parts: a configuration.
        epochs: of the run.
        shape: `num_classes` and `in_channels`.
    """
    from okddip.training.peers import make_group

    factories = backbone_factories(parts.model, **shape)
    probes = [make_backbone() for make_backbone in factories]
    method = make("method", parts.method, **dimensions_of(probes), epochs=epochs)
    method.prepare(shape["num_classes"])
    return make_group(factories, method), method


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
    from okddip.training.peers import saved_parts

    trust.check(state["config"], source)
    config = OmegaConf.create(state["config"])
    group, method = build_group(
        config, config.trainer.epochs, num_classes=len(state["classes"]), in_channels=state["channels"]
    )
    checkpoint.restore(state, **saved_parts(group, method))
    return group, method
