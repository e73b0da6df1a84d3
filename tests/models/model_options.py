"""Models built from their option files, as the program builds them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from okddip.models.backbone import Backbone

OPTIONS = Path(__file__).parents[2] / "conf" / "model"


def factory(
    option: str, num_classes: int = 10, in_channels: int = 3, **changes: object
) -> Callable[[], Backbone]:
    config = OmegaConf.merge(OmegaConf.load(OPTIONS / f"{option}.yaml"), changes)
    return partial(instantiate, config, num_classes=num_classes, in_channels=in_channels)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
