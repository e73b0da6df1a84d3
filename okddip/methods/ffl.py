"""Feature fusion learning (Kim et al., ICPR 2020)."""

from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from okddip.errors import Incompatible, check_choice
from okddip.methods.base import Distillation, Losses, with_ensemble
from okddip.methods.losses import hard_loss
from okddip.outputs import GroupOutput


class FFL(Distillation):
    """hard + alpha * ramp * (fusion_to_peers + ensemble_to_fusion).

    A fusion module over the peers' last feature maps makes one more classifier. It learns from the labels,
    which is part of the hard loss, and from the mean of the peers' logits; each peer learns from it.
    """

    needs_maps: ClassVar[bool] = True
    combination: str | None = "fusion"
    fusion: nn.Module

    def __init__(self, *, fusion_to_peers: bool, ensemble_to_fusion: bool, **settings: Any) -> None:
        """
        Args:
            fusion_to_peers: the peers learn from the fusion module.
            ensemble_to_fusion: the fusion module learns from the mean of the peers' logits.
            settings: see `Distillation`.
        """
        for key, switch in (("fusion_to_peers", fusion_to_peers), ("ensemble_to_fusion", ensemble_to_fusion)):
            check_choice(f"method.{key}", switch, (True, False))
        if not fusion_to_peers and not ensemble_to_fusion:
            raise Incompatible(
                "method.fusion_to_peers=false, method.ensemble_to_fusion=false: nothing is left to learn"
                " from. Use method=independent."
            )
        super().__init__(**settings)
        self.fusion_to_peers = fusion_to_peers
        self.ensemble_to_fusion = ensemble_to_fusion

    def prepare(self, classes: int) -> None:
        self.fusion = fusion_module(self.peers, self.map_channels, classes)

    @property
    def predictors(self) -> tuple[str, ...]:
        return (*super().predictors, "fusion")

    def combine(self, output: GroupOutput) -> Tensor:
        assert output.maps is not None, "FFL needs the feature maps of the peers"
        return self.fusion(output.maps.transpose(0, 1).flatten(1, 2))  # [B, P * c', h', w'] to [B, K]

    def losses(self, output: GroupOutput, labels: Tensor, ramp: Tensor) -> Losses:
        fused = self.combine(output)[None]  # [1, B, K]
        parts = {"hard": hard_loss(output.logits, labels) + hard_loss(fused, labels)}
        if self.fusion_to_peers:
            targets = self.soften(self.sources(fused)).expand_as(output.logits)  # [P, B, K]
            parts["fusion_to_peers"] = self.soft_loss(output.logits, targets)
        if self.ensemble_to_fusion:
            mean = self.sources(output.logits).mean(0, keepdim=True)  # [1, B, K]
            parts["ensemble_to_fusion"] = self.soft_loss(fused, self.soften(mean))
        soft = torch.stack([part for name, part in parts.items() if name != "hard"]).sum()
        total = self.weighted(parts["hard"], soft, ramp)
        return Losses(total, parts, torch.cat([with_ensemble(output.logits, self.peers), fused]))


def fusion_module(peers: int, channels: int, classes: int) -> nn.Sequential:
    """Concatenated feature maps to logits, [B, P * channels, h, w] to [B, K] (paper, section 3.2)."""
    wide = peers * channels
    return nn.Sequential(
        OrderedDict(
            depthwise=nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            norm1=nn.BatchNorm2d(wide),
            relu1=nn.ReLU(),
            pointwise=nn.Conv2d(wide, channels, 1, bias=False),
            norm2=nn.BatchNorm2d(channels),
            relu2=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(channels, classes),
        )
    )
