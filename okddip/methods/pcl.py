"""Peer collaborative learning (Wu and Gong, AAAI 2021)."""

from typing import Any

import torch
from torch import Tensor, nn

from okddip.errors import Incompatible, check_choice
from okddip.methods.base import Distillation, Losses, with_ensemble
from okddip.methods.losses import hard_loss
from okddip.outputs import GroupOutput


class PCL(Distillation):
    """hard + alpha * ramp * (ensemble + mean_teacher).

    A classifier over the features of all peers, one after the other, is the peer ensemble; it learns from the
    labels, which is part of the hard loss, and each peer learns from it. The moving average of each peer is a
    mean teacher of all the other peers. What is kept is the moving average of a peer.
    """

    needs_averages = True
    others: Tensor  # [P - 1, P], row by row each peer's 1st, 2nd, ... other

    def __init__(self, *, ensemble: bool, mean_teacher: bool, **settings: Any) -> None:
        """
        Args:
            ensemble: learn from the peer ensemble; false: there is no such classifier.
            mean_teacher: learn from the mean teachers.
            settings: see `Distillation`.
        """
        for key, switch in (("ensemble", ensemble), ("mean_teacher", mean_teacher)):
            check_choice(f"method.{key}", switch, (True, False))
        if not ensemble and not mean_teacher:
            raise Incompatible(
                "method.ensemble=false, method.mean_teacher=false: nothing is left to learn from. Use"
                " method=independent."
            )
        super().__init__(**settings)
        self.combination = "classifier" if ensemble else None
        self.needs_averages = self.mean_teacher = mean_teacher  # else evaluations alone compute them
        self.primary = "ema/mean"
        self.classifier: nn.Linear | None = None
        shifts = torch.arange(1, self.peers)[:, None] + torch.arange(self.peers)
        self.register_buffer("others", shifts % self.peers, persistent=False)

    def prepare(self, classes: int) -> None:
        if self.combination:
            self.classifier = nn.Linear(sum(self.feature_dims), classes)

    @property
    def predictors(self) -> tuple[str, ...]:
        return (*super().predictors, *([self.combination] if self.combination else []))

    def combine(self, output: GroupOutput) -> Tensor:
        assert self.classifier is not None, "prepare(classes) makes the classifier"
        if len(set(self.feature_dims)) == 1:
            return self.classifier(output.features.transpose(0, 1).flatten(1))  # [B, P * D] to [B, K]
        own = [
            feature[:, :length] for feature, length in zip(output.features, self.feature_dims, strict=True)
        ]
        return self.classifier(torch.cat(own, 1))  # [B, D_0 + D_1 + ...] to [B, K]

    def losses(self, output: GroupOutput, labels: Tensor, ramp: Tensor) -> Losses:
        parts = {"hard": hard_loss(output.logits, labels)}
        predictions = with_ensemble(output.logits, self.peers)
        if self.combination:
            ensemble = self.combine(output)[None]  # [1, B, K]
            parts["hard"] = parts["hard"] + hard_loss(ensemble, labels)
            target = self.soften(self.sources(ensemble)).expand_as(output.logits)  # [P, B, K]
            parts["ensemble"] = self.soft_loss(output.logits, target)
            predictions = torch.cat([predictions, ensemble])
        if self.mean_teacher:
            assert output.averages is not None, "mean teachers are the moving averages of the peers"
            targets = self.soften(output.averages)[self.others]  # [P - 1, P, B, K]
            every = self.soft_loss(output.logits.expand_as(targets), targets)
            parts["mean_teacher"] = every / (self.peers - 1)
        soft = torch.stack([part for name, part in parts.items() if name != "hard"]).sum()
        return Losses(self.weighted(parts["hard"], soft, ramp), parts, predictions)
