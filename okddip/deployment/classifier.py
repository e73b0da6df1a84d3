"""A trained network for its users: from images to probabilities and names of classes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from okddip.data.augment import Normalization, normalize
from okddip.deployment.preprocessing import Images, Preprocessing

BATCH_SIZE = 256  # of `predict`


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
            images: a path, the bytes of an image file, a file open in binary mode or a PIL image, or a list
                of them, of any size, turned upright and scaled as in training; or pixels that are taken as
                they are: an array or tensor uint8 [N, H, W, C], or a list with one [H, W, C] for each image.

        Raises:
            ConfigError: a file is not an image.
            ValueError: an array of another type or shape.
            TypeError: something else; says what is accepted.
        """
        batches = self.preprocessing.pixels(images).split(BATCH_SIZE)
        return torch.cat([self(pixels.to(self.scale.device)).cpu() for pixels in batches])

    @torch.inference_mode()
    def predict(self, images: Images) -> list[str]:
        """The name of the most probable class of each image; see `predict_proba`."""
        batches = self.preprocessing.pixels(images).split(BATCH_SIZE)
        # batch by batch: all probabilities of many images and classes would not fit into memory
        indices = [
            index for pixels in batches for index in self(pixels.to(self.scale.device)).argmax(-1).tolist()
        ]
        return [self.classes[index] for index in indices]
