"""A loaded network predicts the classes of images, however they are given."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_networks import randomize_statistics
from models.model_options import factory
from PIL import Image
from torch import nn

from okddip.data.sources import image_folder
from okddip.data.streaming import StreamingDataset
from okddip.deployment.classifier import Classifier
from okddip.deployment.preprocessing import Preprocessing
from okddip.errors import ConfigError


def test_files_pil_images_and_arrays_are_predicted_alike(tmp_path: Path) -> None:
    network = factory("resnet8")().eval()
    randomize_statistics(network)
    preprocessing = Preprocessing((24, 24), 3, None, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    classifier = Classifier(network, [f"class {i}" for i in range(10)], preprocessing)
    pixels = np.random.default_rng(0).integers(256, size=(5, 24, 24, 3), dtype=np.uint8)
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image).save(file)

    probabilities = classifier.predict_proba(pixels)
    assert probabilities.shape == (5, 10)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(5))
    images = [Image.fromarray(image) for image in pixels]
    contents = [file.read_bytes() for file in files]
    written = [io.BytesIO() for _ in images]
    for image, file in zip(images, written, strict=True):
        image.save(file, "PNG")  # which leaves the file at its end
    several = (files, [str(file) for file in files], images, contents, written, map(bytearray, contents))
    arrays = (torch.from_numpy(pixels), list(pixels), list(torch.from_numpy(pixels)))
    mixed = [pixels[0], files[1], contents[2], written[3], images[4]]
    for same in (*several, *arrays, mixed):
        assert torch.equal(classifier.predict_proba(same), probabilities)
    expected = [f"class {i}" for i in probabilities.argmax(-1).tolist()]
    assert classifier.predict(pixels) == expected
    for one in (files[0], str(files[0]), images[0], contents[0], written[0], memoryview(contents[0])):
        assert classifier.predict(one) == expected[:1]
    with files[0].open("rb") as opened:
        assert classifier.predict(opened) == classifier.predict([opened]) == expected[:1]
        assert not opened.closed
    for wrong in (pixels / 255, pixels[0], pixels[..., :1], pixels[:, :20]):
        with pytest.raises(ValueError, match=r"uint8 \[N, 24, 24, 3\]"):
            classifier.predict(wrong)
    with pytest.raises(ValueError, match=r"image 1 must be uint8 \[24, 24, 3\], not uint8 \[20, 24, 3\]"):
        classifier.predict([pixels[0], pixels[1, :20]])
    with pytest.raises(ConfigError, match="image 1: is not an image"):
        classifier.predict([contents[0], b"no image"])
    for other in (None, 5, [None], [[0, 255]], {"image": 5}.items()):
        with pytest.raises(TypeError, match=r"images must be a path, the bytes of .* \[N, H, W, C\]"):
            classifier.predict(other)
    with pytest.raises(TypeError, match="image 0 is a file that is open as text; open it in binary mode"):
        classifier.predict(io.StringIO("text"))


def test_images_are_scaled_as_the_data_sets_scale_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test", "val"):
        for name in "ab":
            (tmp_path / "images" / split / name).mkdir(parents=True)
            pixels = rng.integers(256, size=(*rng.integers(30, 60, size=2), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / name / "0.png")
    root = str(tmp_path / "images")
    statistics = ((0.5,) * 3, (0.25,) * 3)

    in_memory = image_folder(root, str(tmp_path / "cache"), [20, 24]).test.images
    files = sorted((tmp_path / "images" / "test").glob("*/*"))
    assert torch.equal(Preprocessing((20, 24), 3, None, *statistics).pixels(files), in_memory)

    streamed = StreamingDataset(
        name="s", root=root, image_size=24, resize=28, workers=0, mean=[0.5] * 3, std=[0.25] * 3
    )
    [(images, _)] = streamed.eval_loader("test", 2, torch.device("cpu")).batches()
    files = sorted((tmp_path / "images" / "val").glob("*/*"))
    preprocessing = Preprocessing((24, 24), 3, 28, *statistics)
    classifier = Classifier(nn.Identity(), ["a", "b"], preprocessing)
    assert torch.equal(classifier.normalize(preprocessing.pixels(files)), images)
