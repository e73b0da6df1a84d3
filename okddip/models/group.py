"""Peers that are trained together: P branches on one trunk, or P whole networks."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from okddip.errors import ConfigError, check_choice, check_number
from okddip.models.backbone import Backbone
from okddip.outputs import STRUCTURES, GroupOutput


class PeerGroup(nn.Module):
    """P peers of one architecture, each with its own initial weights.

    Args:
        make_backbone: builds one network; called once per peer.
        peers: P, the number of peers.
        structure: `branch`: one trunk, P heads and classifiers; `network`: P whole networks.
        rescale: divide the gradient by P where the trunk ends (`rescale_gradient`); `branch` only.
        teacher: a trained network, already on the device, whose logits are returned too. It stays in eval
            mode, gets no gradient and is not part of the group's state.

    Raises:
        ConfigError: `peers` is not a positive whole number, the structure does not exist, or there is no
            shared trunk whose gradient could be rescaled.
    """

    def __init__(
        self,
        make_backbone: Callable[[], Backbone],
        peers: int,
        structure: str = "branch",
        rescale: bool = False,
        teacher: Backbone | None = None,
    ) -> None:
        super().__init__()
        check_number("method.peers", peers, minimum=1, integer=True)
        check_choice("method.structure", structure, STRUCTURES)
        if rescale and structure == "network":
            raise ConfigError(
                "method.rescale=true: the gradient is rescaled where a shared trunk ends, and networks share "
                "none. Set method.structure=branch or method.rescale=false."
            )
        backbones = [make_backbone() for _ in range(peers)]
        # inside a tuple: a module in an attribute would be registered, trained and saved
        self.teacher = () if teacher is None else (teacher.eval().requires_grad_(False),)
        self.structure = structure
        self.rescale = rescale
        self.feature_dim = backbones[0].feature_dim
        self.trunk_channels = backbones[0].trunk_channels
        self.minimum_size = backbones[0].minimum_size
        if structure == "branch":
            self.trunk = backbones[0].trunk
            self.peers = nn.ModuleList(Branch(backbone.head, backbone.classifier) for backbone in backbones)
        else:
            self.peers = nn.ModuleList(backbones)

    def forward(self, images: Tensor) -> GroupOutput:
        """Map images [B, C, H, W] to the logits, features and trunk output of all peers."""
        peers: Any = self.peers
        if self.structure == "branch":
            trunk = self.trunk(images)  # [B, c, h, w]
            if self.rescale:
                trunk = rescale_gradient(trunk, 1 / len(peers))
            features = [peer.head(trunk) for peer in peers]
        else:
            trunk = None
            features = [peer.head(peer.trunk(images)) for peer in peers]
        logits = [peer.classifier(feature) for peer, feature in zip(peers, features, strict=True)]
        with torch.no_grad():
            teacher = self.teacher[0](images) if self.teacher else None  # [B, K]
        return GroupOutput(torch.stack(logits), torch.stack(features), trunk, teacher)

    def extract(self, index: int) -> Backbone:
        """Copy one peer out of the group as a plain network that gives exactly that peer's logits."""
        peer: Any = self.peers[index]
        return Backbone(
            copy.deepcopy(self.trunk if self.structure == "branch" else peer.trunk),
            copy.deepcopy(peer.head),
            copy.deepcopy(peer.classifier),
            feature_dim=self.feature_dim,
            trunk_channels=self.trunk_channels,
            minimum_size=self.minimum_size,
        )


class Branch(nn.Module):
    """What a peer owns beside the shared trunk."""

    def __init__(self, head: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.classifier = classifier


def rescale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return `x` unchanged, its gradient times `factor`.

    With factor 1/P where P branches leave the trunk, this is the backpropagation rescaling of intermediate
    representations (ILR) of collaborative learning: the trunk learns at the pace of one network for any
    number of branches (Song & Chai, NeurIPS 2018, section 3.3).
    """
    return _RescaleGradient.apply(x, factor)


class _RescaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None
