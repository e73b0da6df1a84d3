"""Peers that are trained together: P branches on one trunk, or P whole networks."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okddip.errors import ConfigError, Incompatible, check_choice, check_number
from okddip.models.averages import MovingAverages
from okddip.models.backbone import Backbone
from okddip.outputs import STRUCTURES, GroupOutput


class PeerGroup(nn.Module):
    """P peers, each with its own initial weights.

    Args:
        make_backbone: builds one network; called once per peer. Or a list, of one, or with `network` of one
            for each peer, whose architectures may differ.
        peers: P, the number of peers.
        structure: `branch`: one trunk, P heads and classifiers; `network`: P whole networks.
        rescale: divide the gradient by P where the trunk ends (`rescale_gradient`); `branch` only.
        maps: return the last feature maps of the heads too.
        teacher: a trained network, already on the device, whose logits are returned too; or several. They
            stay in eval mode, get no gradient and are not part of the group's state.

    Raises:
        ConfigError: `peers` is not a positive whole number, or not that of the networks; the structure does
            not exist, there is no shared trunk whose gradient could be rescaled, or a head does not tell its
            feature maps.
    """

    def __init__(
        self,
        make_backbone: Callable[[], Backbone] | Sequence[Callable[[], Backbone]],
        peers: int,
        structure: str = "branch",
        rescale: bool = False,
        teacher: Backbone | Sequence[Backbone] | None = None,
        maps: bool = False,
    ) -> None:
        super().__init__()
        check_number("method.peers", peers, minimum=1, integer=True)
        check_choice("method.structure", structure, STRUCTURES)
        if rescale and structure == "network":
            raise ConfigError(
                "method.rescale=true: the gradient is rescaled where a shared trunk ends, and networks share "
                "none. Set method.structure=branch or method.rescale=false."
            )
        factories = [make_backbone] if callable(make_backbone) else list(make_backbone)
        if len(factories) not in (1, peers):
            raise ConfigError(f"method.peers={peers}: there are {len(factories)} networks.")
        if structure == "branch" and len(factories) > 1:
            raise Incompatible("method.structure=branch: networks of different architectures share no trunk.")
        backbones = [make() for make in (factories * peers if len(factories) == 1 else factories)]
        # inside a tuple: a module in an attribute would be registered, trained and saved
        teachers = [teacher] if isinstance(teacher, nn.Module) else teacher or ()
        self.teacher = tuple(each.eval().requires_grad_(False) for each in teachers)
        self.averages: tuple[MovingAverages, ...] = ()  # for the same reason
        self.averages_in_training = False
        self.structure = structure
        self.rescale = rescale
        self.maps = maps
        if maps and not all(isinstance(backbone.head, nn.Sequential) for backbone in backbones):
            raise Incompatible(
                "model: this method reads the feature maps before pooling, and the head of this model does"
                " not tell them: it must be an nn.Sequential that ends with the pooling."
            )
        self.dimensions = [backbone.dimensions for backbone in backbones]
        self.minimum_sizes = [backbone.minimum_size for backbone in backbones]
        if structure == "branch":
            self.trunk = backbones[0].trunk
            self.peers = nn.ModuleList(Branch(backbone.head, backbone.classifier) for backbone in backbones)
        else:
            self.peers = nn.ModuleList(backbones)

    def forward(self, images: Tensor) -> GroupOutput:
        """Map images to the logits, features and trunk output of all peers.

        Args:
            images: [B, C, H, W], or a view for each peer [B, P, C, H, W]; then the trunk's output is the mean
                over the views, and a teacher sees the first.
        """
        peers: Any = self.peers
        views = images.transpose(0, 1) if images.dim() == 5 else None  # [P, B, C, H, W]
        trunk: Tensor | None = None
        if self.structure == "network":
            seen = [images] * len(peers) if views is None else views.unbind()
            inputs = [peer.trunk(view) for peer, view in zip(peers, seen, strict=True)]
        else:
            shared = self.trunk(images if views is None else views.flatten(0, 1))  # [B or P * B, c, h, w]
            if self.rescale:
                shared = rescale_gradient(shared, 1 / len(peers))
            parts = None if views is None else shared.unflatten(0, views.shape[:2])  # [P, B, c, h, w]
            inputs = [shared] * len(peers) if parts is None else parts.unbind()
            trunk = shared if parts is None else parts.mean(0)
        maps = None
        if self.maps:
            last = [before_pooling(peer.head, x) for peer, x in zip(peers, inputs, strict=True)]
            features = [peer.head[-1](x) for peer, x in zip(peers, last, strict=True)]
            if len(shapes := {each.shape[1:] for each in last}) > 1:
                sizes = ", ".join("x".join(map(str, shape)) for shape in sorted(shapes))
                raise Incompatible(
                    "model.peers: this method fuses the last feature maps of all peers, and those of these"
                    f" networks differ ({sizes}). Choose networks with equal maps, or another method."
                )
            maps = torch.stack(last)
        else:
            features = [peer.head(x) for peer, x in zip(peers, inputs, strict=True)]
        logits = [peer.classifier(feature) for peer, feature in zip(peers, features, strict=True)]
        with torch.no_grad():
            first = images if views is None else views[0]
            taught = [teacher(first) for teacher in self.teacher]  # [B, K] each
            teacher = torch.stack(taught) if len(taught) > 1 else taught[0] if taught else None
            averages = None
            if self.computes_averages:
                averages = self.averages[0].group(images).logits  # [P, B, K]
        return GroupOutput(torch.stack(logits), stack_filled(features), trunk, teacher, averages, maps)

    def keep_averages(self, decay: float, *, in_training: bool) -> None:
        """Keep moving averages of the peers, beginning with their present weights.

        They are no part of the group's state, nor of its parameters. `GroupOutput.averages` has their logits.

        Args:
            decay: see `MovingAverages`.
            in_training: compute their logits in training too, and not in evaluations alone.
        """
        alone = copy.copy(self)
        alone.teacher, alone.averages, alone.maps = (), (), False
        self.averages = (MovingAverages(alone, decay),)
        self.averages_in_training = in_training

    @property
    def computes_averages(self) -> bool:
        """Whether a forward pass gives the logits of the averages, which training may not need."""
        return bool(self.averages) and (self.averages_in_training or not self.training)

    def update_averages(self) -> None:
        """Move the averages, if there are any, towards the present weights."""
        for averages in self.averages:
            averages.update(self)

    def extract(self, index: int) -> Backbone:
        """Copy one peer out of the group as a plain network that gives exactly that peer's logits."""
        peer: Any = self.peers[index]
        return Backbone(
            copy.deepcopy(self.trunk if self.structure == "branch" else peer.trunk),
            copy.deepcopy(peer.head),
            copy.deepcopy(peer.classifier),
            **self.dimensions[index],
            minimum_size=self.minimum_sizes[index],
        )


class Branch(nn.Module):
    """What a peer owns beside the shared trunk."""

    def __init__(self, head: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.classifier = classifier


def stack_filled(features: Sequence[Tensor]) -> Tensor:
    """Features of all peers, [B, D_i] each to [P, B, D]; shorter ones are filled up with zeros."""
    longest = max(feature.shape[1] for feature in features)
    return torch.stack(
        [
            feature if feature.shape[1] == longest else F.pad(feature, (0, longest - feature.shape[1]))
            for feature in features
        ]
    )


def before_pooling(head: nn.Sequential, x: Tensor) -> Tensor:
    """What goes into the last module of a head."""
    *stage, _ = head
    for module in stage:
        x = module(x)
    return x


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
