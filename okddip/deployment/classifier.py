"""An exported network in Python: from its folder to predictions."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageOps
from torch import Tensor, nn

from okddip.assembly import make
from okddip.data.augment import Normalization, normalization, normalize
from okddip.data.folder import convert, read_image, scale_and_crop
from okddip.deployment.predictors import Ensemble
from okddip.errors import ConfigError
from okddip.models.group import PeerGroup
from okddip.plain_data import NotTrusted, plain
from okddip.training import checkpoint
from okddip.training.finite import not_finite
from okddip.trust import Trust, trust_in

BATCH = 256  # images at a time in `predict`

# a file, an image, several of them, or uint8 pixels [N, H, W, C]
Images = str | Path | Image.Image | Sequence[str | Path | Image.Image] | np.ndarray | Tensor


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes what the network takes.

    Attributes:
        image_size: (height, width).
        channels: 3 (RGB) or 1 (grey).
        resize: pixels of the shorter side before an image is cropped at its centre; None: as few as cover the
            image size.
        mean, std: a number a channel, for pixels in [0, 1].
    """

    image_size: tuple[int, int]
    channels: int
    resize: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ValueError where one of them cannot be."""
        sizes = (*self.image_size, self.channels, *(() if self.resize is None else (self.resize,)))
        if not all(isinstance(size, int) and size > 0 for size in sizes) or len(self.image_size) != 2:
            raise ValueError(f"image sizes and channels must be positive whole numbers, not {sizes}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean {self.mean} and std {self.std} must have {self.channels} numbers each")
        if not all(math.isfinite(number) for number in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} must be finite, and std {self.std} above 0")

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "Preprocessing":
        """From what JSON or a checkpoint keeps of one; other keys are ignored."""
        return cls(
            image_size=cast(tuple[int, int], tuple(values["image_size"])),
            channels=values["channels"],
            resize=values.get("resize"),
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
        )

    def plain(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)

    def normalization(self) -> Normalization:
        """`(x / 255 - mean) / std` as one multiplication and one addition."""
        return normalization(self.mean, self.std, torch.device("cpu"))

    def pixels(self, images: Images) -> Tensor:
        """Images as uint8 [N, H, W, C] of the right size.

        Raises:
            ConfigError: a file that is no image.
            ValueError: an array of another type or shape.
        """
        if isinstance(images, np.ndarray | Tensor):
            shape = (*self.image_size, self.channels)
            type_name = str(images.dtype).removeprefix("torch.")
            if type_name != "uint8" or images.ndim != 4 or tuple(images.shape[1:]) != shape:
                raise ValueError(
                    f"images must be uint8 [N, {', '.join(map(str, shape))}], not {type_name}"
                    f" {list(images.shape)}; files and PIL images of any size are scaled."
                )
            return torch.tensor(images) if isinstance(images, np.ndarray) else images
        several = [images] if isinstance(images, str | Path | Image.Image) else list(images)
        if not several:
            return torch.empty(0, *self.image_size, self.channels, dtype=torch.uint8)
        return torch.stack([self._pixels_of_one(image) for image in several])

    def _pixels_of_one(self, image: str | Path | Image.Image) -> Tensor:
        """[H, W, C], scaled as the data sets scale."""
        upright = (
            convert(image, self.channels)
            if isinstance(image, Image.Image)
            else read_image(str(image), self.channels)
        )
        height, width = self.image_size
        if self.resize is not None:
            upright = scale_and_crop(upright, self.resize, self.image_size)
        elif upright.size != (width, height):
            upright = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(upright).reshape(height, width, self.channels))


class Classifier(nn.Module):
    """A trained network with what belongs to it: pixels in, probabilities out.

    Attributes:
        network: normalised images float32 [B, C, H, W] to logits [B, K].
        classes: their names, in the order of the logits.
        preprocessing: what comes before `network`.
    """

    scale: Tensor  # [C, 1, 1]
    shift: Tensor  # [C, 1, 1]

    def __init__(self, network: nn.Module, classes: Sequence[str], preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.classes = tuple(classes)
        self.preprocessing = preprocessing
        constants = preprocessing.normalization()
        self.register_buffer("scale", constants.scale, persistent=False)
        self.register_buffer("shift", constants.shift, persistent=False)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels uint8 [B, H, W, C] to probabilities [B, K]."""
        return self.network(self.normalize(pixels)).softmax(-1)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Map pixels uint8 [B, H, W, C] to what `network` takes, float32 [B, C, H, W]."""
        return normalize(pixels, Normalization(self.scale, self.shift))

    @torch.inference_mode()
    def predict_proba(self, images: Images) -> Tensor:
        """The probabilities of the classes, float32 [N, K], on the CPU.

        Args:
            images: a file or a PIL image or a list of them, of any size, turned upright and scaled as in
                training; or an array or tensor uint8 [N, H, W, C], taken as it is.

        Raises:
            ConfigError: a file that is no image.
            ValueError: an array of another type or shape.
        """
        batches = self.preprocessing.pixels(images).split(BATCH)
        return torch.cat([self(pixels.to(self.scale.device)).cpu() for pixels in batches])

    def predict(self, images: Images) -> list[str]:
        """The name of the most probable class of each image; see `predict_proba`."""
        return [self.classes[index] for index in self.predict_proba(images).argmax(-1).tolist()]


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
    config = plain({"model": description["model"]}, "", source)
    trust.check(config, source)
    make_backbone = partial(
        make,
        "model",
        OmegaConf.create(config).model,
        num_classes=len(description["classes"]),
        in_channels=description["preprocessing"]["channels"],
    )
    ensemble = description["ensemble"]
    if ensemble is None:
        return make_backbone()
    return Ensemble(PeerGroup(make_backbone, ensemble["peers"], ensemble["structure"]))
