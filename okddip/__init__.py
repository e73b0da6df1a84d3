"""Online knowledge distillation with diverse peers, and what it is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from okddip.deployment.classifier import Classifier

__version__ = "0.1.0"


def load(folder: str | Path) -> Classifier:
    """The network in a folder that `okddip task=export` wrote, ready for `predict(images)`.

    Raises:
        ConfigError: the folder holds no exported network, or a damaged one.
    """
    from okddip.deployment.classifier import load  # importing okddip must not import torch

    return load(folder)
