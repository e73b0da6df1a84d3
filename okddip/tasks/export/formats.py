"""The formats of task `export`: how a network is written in each, and how the file is run."""

import io
import json
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from okddip import deployment
from okddip.deployment.classifier import Classifier
from okddip.deployment.loading import read
from okddip.deployment.preprocessing import Preprocessing
from okddip.trust import Trust
from okddip.version import __version__


class Format(NamedTuple):
    """A file format for networks.

    Attributes:
        file: its name; for `mlflow` a folder's.
        packages: what writing and running it needs of the extra `export`.
        write: (classifier, content of model.json, path) -> None.
        run: (path, pixels [B, H, W, C], images [B, C, H, W], trusted modules) -> the file's outputs [B, K].
        outputs: what those are.
    """

    file: str
    packages: tuple[str, ...]
    write: Callable[[Classifier, dict[str, Any], Path], None]
    run: Callable[[Path, Tensor, Tensor, Trust], Tensor]
    outputs: str = "logits"


def example_pixels(count: int, preprocessing: Preprocessing) -> Tensor:
    """Random pixels, the same each time, uint8 [N, H, W, C]."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, *preprocessing.image_size, preprocessing.channels)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def export_program(module: torch.nn.Module, example: Tensor, name: str) -> torch.export.ExportedProgram:
    """The program of a module with one input of that name, whose first dimension may have any size."""
    batch = torch.export.Dim("batch")
    with torch.no_grad():  # where a module itself switches gradients off, the program could not be loaded
        return torch.export.export(module, (example,), dynamic_shapes={name: {0: batch}})


def save_program(
    program: torch.export.ExportedProgram, path: Path, extra_files: dict[str, str] | None = None
) -> None:
    """Write a program by way of memory: on a full disk PyTorch's own writer ends the process."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=extra_files)
    path.write_bytes(buffer.getbuffer())


def write_safetensors(classifier: Classifier, description: dict[str, Any], path: Path) -> None:
    """The weights, for `okddip.load`; with `model.json` as metadata."""
    from safetensors.torch import save

    state = {name: tensor.contiguous() for name, tensor in classifier.network.state_dict().items()}
    path.write_bytes(save(state, {"format": "pt", "okddip": json.dumps(description)}))


def run_safetensors(path: Path, pixels: Tensor, images: Tensor, trust: Trust) -> Tensor:
    with torch.inference_mode():
        return read(path.parent, trust).network(images)


def write_torch(classifier: Classifier, description: dict[str, Any], path: Path) -> None:
    """A program for `torch.export.load`, images to logits; with `model.json` as an extra file."""
    images = classifier.normalize(example_pixels(2, classifier.preprocessing))
    program = export_program(classifier.network, images, "images")
    save_program(program, path, {"model.json": json.dumps(description)})


def run_torch(path: Path, pixels: Tensor, images: Tensor, trust: Trust) -> Tensor:
    with torch.inference_mode():
        return torch.export.load(path).module()(images)


def write_onnx(classifier: Classifier, description: dict[str, Any], path: Path) -> None:
    """An ONNX model, images to logits; with `model.json` in its metadata."""
    images = classifier.normalize(example_pixels(2, classifier.preprocessing))
    program = torch.onnx.export(
        export_program(classifier.network, images, "images"),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props["okddip"] = json.dumps(description)
    program.save(path, external_data=False)


def run_onnx(path: Path, pixels: Tensor, images: Tensor, trust: Trust) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def write_mlflow(classifier: Classifier, description: dict[str, Any], path: Path) -> None:
    """A model for `mlflow models serve` and `mlflow.pyfunc.load_model`; see `okddip.deployment.serving`."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Array

    preprocessing = classifier.preprocessing
    shape = (-1, *preprocessing.image_size, preprocessing.channels)
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype(np.uint8), shape)]),
        Schema([ColSpec(DataType.string, "label"), ColSpec(Array(DataType.double), "probabilities")]),
    )
    pixels = example_pixels(2, preprocessing)
    with tempfile.TemporaryDirectory() as temporary:
        program = Path(temporary) / "program.pt2"
        save_program(export_program(classifier, pixels, "pixels"), program)
        notes = Path(temporary) / "model.json"
        notes.write_text(json.dumps(description, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        mlflow.pyfunc.save_model(
            path,
            python_model=str(Path(deployment.__file__).with_name("serving.py")),
            artifacts={"program": str(program), "description": str(notes)},
            signature=signature,
            input_example=pixels[:1].numpy(),
            pip_requirements=[f"{package}=={version(package)}" for package in ("mlflow", "numpy", "torch")],
            metadata={"okddip": __version__, "predictor": description["predictor"]},
        )


def run_mlflow(path: Path, pixels: Tensor, images: Tensor, trust: Trust) -> Tensor:
    import mlflow

    table = mlflow.pyfunc.load_model(str(path)).predict(pixels.numpy())
    return torch.tensor(table["probabilities"].tolist())


FORMATS = {
    "safetensors": Format("model.safetensors", ("safetensors",), write_safetensors, run_safetensors),
    "torch": Format("model.pt2", (), write_torch, run_torch),
    "onnx": Format("model.onnx", ("onnx", "onnxruntime", "onnxscript"), write_onnx, run_onnx),
    "mlflow": Format("mlflow", (), write_mlflow, run_mlflow, outputs="probabilities"),
}
