"""Load the network in a folder that `okddip task=export` wrote."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from okddip.assembly import backbone_factories
from okddip.deployment.classifier import Classifier
from okddip.deployment.predictors import Combination, Ensemble, build_group
from okddip.deployment.preprocessing import Preprocessing
from okddip.errors import ConfigError
from okddip.models.group import PeerGroup
from okddip.plain_data import NotTrusted, plain
from okddip.training import checkpoint
from okddip.training.checkpoint import MOST_EPOCHS
from okddip.training.finite import not_finite
from okddip.trust import Trust, trust_in


def load(folder: str | Path, trust: Sequence[str] = ()) -> Classifier:
    """The network in a folder that `okddip task=export` wrote, on the CPU.

    A folder of a stranger's can give wrong predictions, and no more: of what `model.json` names, only models
    of this program and modules of torch.nn are built, and no weights are unpickled.

    Args:
        folder: with `model.json` and `model.safetensors`.
        trust: modules of your own, such as ["mine"], in which the model may be defined as well.

    Raises:
        ConfigError: the folder holds no exported network, a damaged one, or one whose model is not trusted.
    """
    return read(Path(folder).expanduser(), trust_in(trust))


def read(folder: Path, trust: Trust) -> Classifier:
    """See `load`."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ConfigError(f"Loading needs {error.name}: pip install 'okddip[export]'") from error
    try:
        description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
        network = build_network(description, trust, folder / "model.json")
        network.load_state_dict(weights)
        if broken := not_finite(network):
            raise ConfigError(f"{folder}: its weights are not finite ({broken}); export another checkpoint.")
        preprocessing = Preprocessing.from_plain(description["preprocessing"])
        checkpoint.warn_of_other_version({"version": description["okddip"]}, folder)
        return Classifier(network, description["classes"], preprocessing)
    except OSError as error:
        raise ConfigError(
            f"{folder}: holds no exported network ({error}). `okddip task=export` writes one, with"
            " safetensors among export.formats."
        ) from error
    except KeyError as error:
        raise ConfigError(f"{folder}: is damaged (model.json has no {error}); export it again.") from error
    except NotTrusted:
        raise
    except (ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{folder}: is damaged ({error}); export it again.") from error


def build_network(description: dict[str, Any], trust: Trust, source: object) -> nn.Module:
    """The network that `model.json` describes, without its weights."""
    combination = description.get("combination")
    parts = {"model": description["model"], **({"method": combination["method"]} if combination else {})}
    config = plain(parts, "", source)
    trust.check(config, source)
    made = OmegaConf.create(config)
    shape = {
        "num_classes": len(description["classes"]),
        "in_channels": description["preprocessing"]["channels"],
    }
    if combination is not None:
        return Combination(*build_group(made, MOST_EPOCHS, **shape))
    factories = backbone_factories(made.model, **shape)
    ensemble = description["ensemble"]
    if ensemble is None:
        return factories[0]()
    peers = ensemble["peers"]
    return Ensemble(PeerGroup(factories[:peers], peers, ensemble["structure"]))
