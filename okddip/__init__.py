"""Online knowledge distillation with diverse peers, and what it is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from okddip.version import __version__ as __version__

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from okddip.api import compose as compose
    from okddip.api import history as history
    from okddip.api import runs as runs
    from okddip.api import train as train
    from okddip.deployment.classifier import Classifier

FROM_PYTHON = ("compose", "history", "runs", "train")  # of `okddip.api`, imported when they are used


def load(folder: str | Path, trust: Sequence[str] = ()) -> Classifier:
    """The network in a folder that `okddip task=export` wrote, ready for `predict(images)`.

    Args:
        folder: with `model.json` and `model.safetensors`; whoever wrote it, no code of theirs runs.
        trust: modules of your own, such as ["mine"], in which the model may be defined as well.

    Raises:
        ConfigError: the folder holds no exported network, a damaged one, or one whose model is not trusted.
    """
    from okddip.deployment.loading import load  # importing okddip must not import torch

    return load(folder, trust)


def __getattr__(name: str) -> Any:
    if name in FROM_PYTHON:
        from okddip import api  # importing okddip must import neither torch nor pandas

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *FROM_PYTHON])
