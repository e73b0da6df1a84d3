"""OKDDip: online knowledge distillation with diverse peers (Chen et al., AAAI 2020; train_GL.py)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from okddip.errors import Incompatible, check_choice, check_number
from okddip.methods.base import Distillation, Losses, with_ensemble
from okddip.methods.losses import hard_loss
from okddip.outputs import GroupOutput


class OKDDip(Distillation):
    """hard + alpha * ramp * (first_level + second_level).

    First level: each auxiliary peer imitates a mixture of its own, the peers' logits weighted by attention
    between linear projections of their features (paper, equations 3 to 6), so that targets differ and peers
    stay diverse. Second level: the last peer, the group leader, imitates the mean of the auxiliary peers'
    logits; it is the network kept for inference.
    """

    itself: Tensor  # [A, A], true where a peer asks itself

    def __init__(
        self,
        *,
        leader: bool,
        attention: bool,
        include_self: bool,
        aggregate: str,
        projection_factor: int,
        **settings: Any,
    ) -> None:
        """
        Args:
            leader: the last peer is the group leader; false: all are auxiliary peers, no second level.
            attention: learn the weights of the mixtures; false: each is the uniform mean.
            include_self: a peer's own logits take part in its mixture.
            aggregate: mix the peers' `logits`, before the softmax, or their softened `probabilities`.
            projection_factor: query and key have D / projection_factor features. Where auxiliary peers have
                features of different lengths, each length has its projections, and D is the shortest.
            settings: see `Distillation`. With `detach_targets` the attention weights keep their gradient, or
                the projections would learn nothing.
        """
        switches = {"leader": leader, "attention": attention, "include_self": include_self}
        for key, switch in switches.items():
            check_choice(f"method.{key}", switch, (True, False))
        super().__init__(**settings)
        if leader and self.peers < 3:
            raise Incompatible(
                f"method.peers={self.peers}: OKDDip takes at least 3, two auxiliary peers and the group"
                " leader (2 with method.leader=false)."
            )
        check_choice("method.aggregate", aggregate, ("logits", "probabilities"))
        self.leader = leader
        self.include_self = include_self
        self.aggregate = aggregate
        self.auxiliary = self.peers - 1 if leader else self.peers
        shortest = min(self.feature_dims[: self.auxiliary])
        check_number("method.projection_factor", projection_factor, minimum=1, maximum=shortest, integer=True)
        self.kept = self.peers - 1 if leader else 0
        self.primary = "leader" if leader else "ensemble"
        self.query: nn.Linear | Projections | None = None
        self.key: nn.Linear | Projections | None = None
        if attention:
            lengths, projection_dim = self.feature_dims[: self.auxiliary], shortest // projection_factor
            if len({*lengths, self.feature_dim}) > 1:
                self.query, self.key = (Projections(lengths, projection_dim) for _ in range(2))
            else:
                self.query = nn.Linear(self.feature_dim, projection_dim, bias=False)
                self.key = nn.Linear(self.feature_dim, projection_dim, bias=False)
        self.register_buffer("itself", torch.eye(self.auxiliary, dtype=torch.bool), persistent=False)

    @property
    def predictors(self) -> tuple[str, ...]:
        leader = ("leader",) if self.leader else ()
        return (*(f"peer{i}" for i in range(self.auxiliary)), *leader, "ensemble")

    def attend(self, features: Tensor) -> Tensor:
        """How much attention peer a pays to peer b: softmax over b of q(h_a) . k(h_b), unscaled.

        Args:
            features: [A, B, D], of the auxiliary peers.

        Returns:
            [B, A asks, A answers]; rows sum to 1.
        """
        if self.query is not None and self.key is not None:
            energy = torch.einsum("abd,cbd->bac", self.query(features), self.key(features))  # [B, A, A]
        else:
            energy = features.new_zeros(features.shape[1], self.auxiliary, self.auxiliary)  # [B, A, A]
        if not self.include_self:
            energy = energy.masked_fill(self.itself, float("-inf"))
        return energy.softmax(-1)

    def log_targets(self, attention: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities at temperature T of what the auxiliary peers and the leader imitate.

        Args:
            attention: [B, A, A].
            logits: [A, B, K], of the auxiliary peers.

        Returns:
            [A, B, K] for the auxiliary peers, [1, B, K] for the leader.
        """
        logits = self.sources(logits)
        if self.aggregate == "logits":
            mixtures = torch.einsum("bac,cbk->abk", attention, logits)  # [A, B, K]
            mean = logits.mean(0, keepdim=True)  # [1, B, K]
            return self.soften(mixtures), self.soften(mean)
        probabilities = (logits / self.temperature).softmax(-1)  # [A, B, K]
        mixtures = torch.einsum("bac,cbk->abk", attention, probabilities)  # [A, B, K]
        mean = probabilities.mean(0, keepdim=True)  # [1, B, K]
        smallest = torch.finfo(logits.dtype).tiny  # a probability may underflow; its logarithm must not
        return mixtures.clamp_min(smallest).log(), mean.clamp_min(smallest).log()

    def losses(self, output: GroupOutput, labels: Tensor, ramp: Tensor) -> Losses:
        peers, leader = output.logits[: self.auxiliary], output.logits[self.auxiliary :]
        attention = self.attend(output.features[: self.auxiliary])
        peer_targets, leader_target = self.log_targets(attention, peers)

        hard = hard_loss(output.logits, labels)
        first_level = self.soft_loss(peers, peer_targets)
        parts = {"hard": hard, "first_level": first_level}
        soft = first_level
        if self.leader:
            parts["second_level"] = self.soft_loss(leader, leader_target)
            soft = soft + parts["second_level"]
        total = self.weighted(hard, soft, ramp)
        predictions = with_ensemble(output.logits, self.auxiliary)
        return Losses(total, parts, predictions, {"attention": attention.mean(0)})


class Projections(nn.Module):
    """A linear projection for each length of features to one length that all have in common.

    Args:
        lengths: of each peer's features; peers with equal lengths share a projection.
        projection_dim: d, what all are projected to.
    """

    def __init__(self, lengths: Sequence[int], projection_dim: int) -> None:
        super().__init__()
        self.lengths = tuple(lengths)
        self.of_length = nn.ModuleDict(
            {str(length): nn.Linear(length, projection_dim, bias=False) for length in dict.fromkeys(lengths)}
        )

    def forward(self, features: Tensor) -> Tensor:
        """Features [A, B, D], each peer's own followed by zeros, to [A, B, d]."""
        return torch.stack(
            [
                self.of_length[str(length)](feature[:, :length])
                for feature, length in zip(features, self.lengths, strict=True)
            ]
        )
