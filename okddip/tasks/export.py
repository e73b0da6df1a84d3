"""Task `export`: one predictor of a checkpoint as a plain network, for other programs to run."""

import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig
from torch import Tensor

from okddip import deployment
from okddip.deployment.classifier import Classifier, Preprocessing, read
from okddip.deployment.predictors import default_predictor, exportable_predictors, extract, rebuild
from okddip.errors import ConfigError, check_choice
from okddip.tasks.named_checkpoint import chosen_keys, open_checkpoint
from okddip.text import for_terminal
from okddip.trust import Trust, trust_of
from okddip.version import __version__

log = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of a format's outputs against PyTorch's; relative where those are larger than 1


class Format(NamedTuple):
    """One way to write a network down."""

    file: str  # or folder
    needs: tuple[str, ...]  # packages of the extra `export`
    # (network, description as of model.json, path) -> None
    write: Callable[[Classifier, dict[str, Any], Path], None]
    # (path, pixels [B, H, W, C], images [B, C, H, W], what may be built) -> what the file answers, [B, K]
    run: Callable[[Path, Tensor, Tensor, Trust], Tensor]
    gives: str = "logits"


def export(config: DictConfig, build: Callable[..., Any]) -> str:
    """Write one predictor of a checkpoint into a new folder, check each file, and say how large it is.

    The folder appears when it is whole: `model.json` says what the network is, and what comes before it.

    Args:
        config: resolved; `checkpoint`, and the settings of `export`.
        build: not needed: no data is read.

    Returns:
        The folder.

    Raises:
        ConfigError: a setting that is not allowed, or a package that is not installed.
    """
    settled = (
        "method",
        "methods",
        "model",
        "dataset",
        "trainer",
        "optimizer",
        "scheduler",
        "experiment",
        "ablation",
        "seed",
    )
    chosen_keys("export", settled)
    if not isinstance(config.get("export"), DictConfig):
        raise ConfigError("export: is not in the configuration. See conf/task/export.yaml.")
    names = check_formats(config.export.formats)
    out = config.export.out or f"{HydraConfig.get().runtime.output_dir}/export"
    folder = Path(str(out)).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"export.out={folder}: is there already. Name a new folder, or remove it.")
    path, state = open_checkpoint(config)
    with quiet():  # warnings about a schedule concern training
        trust = trust_of(config)
        group, method = rebuild(state, trust, path)
    predictor = config.export.predictor
    if predictor is None:
        predictor = default_predictor(method, state["history"])
    check_choice("export.predictor", predictor, exportable_predictors(method))

    network = extract(group, method, predictor)
    ensemble = {"peers": method.auxiliary, "structure": method.structure} if predictor == "ensemble" else None
    preprocessing = Preprocessing.from_plain({**state, "resize": state["config"]["dataset"].get("resize")})
    classifier = Classifier(network, state["classes"], preprocessing)
    description = describe(classifier, predictor, ensemble, state)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as temporary:
            written = Path(temporary) / "export"
            written.mkdir()
            rows = write(classifier, description, names, written, trust)
            written.rename(folder)
    except OSError as error:
        raise ConfigError(f"export.out={folder}: cannot be written ({error.strerror or error}).") from error
    log.info(
        "%s of %s, %s parameters\n%s\n%s",
        *(predictor, for_terminal(path), f"{description['parameters']:,}"),
        "\n".join(rows),
        for_terminal(folder),
    )
    return str(folder)


def check_formats(names: Any) -> list[str]:
    """The formats that a setting names, each of which can be written here.

    Raises:
        ConfigError: a format that does not exist, or one whose packages are not installed.
    """
    if not isinstance(names, list | tuple | ListConfig) or not names:
        raise ConfigError(f"export.formats={names}: must be a list of {', '.join(FORMATS)}.")
    for name in names:
        check_choice("export.formats", name, FORMATS)
        missing = [package for package in FORMATS[name].needs if find_spec(package) is None]
        if missing:
            raise ConfigError(
                f"export.formats: {name} needs {', '.join(missing)}. Install with"
                " pip install 'okddip[export]', or leave it out."
            )
    return list(names)


def describe(
    classifier: Classifier, predictor: str, ensemble: dict[str, Any] | None, state: dict[str, Any]
) -> dict[str, Any]:
    """What `model.json` holds."""
    last = state["history"].get("last", {})
    return {
        "okddip": __version__,
        "predictor": predictor,
        "parameters": sum(parameter.numel() for parameter in classifier.network.parameters()),
        "model": state["config"]["model"],
        "ensemble": ensemble,
        "classes": list(classifier.classes),
        "preprocessing": classifier.preprocessing.plain(),
        "interface": {
            "images": "float32 [batch, channels, height, width]: (pixel / 255 - mean) / std, pixels 0 to 255",
            "logits": "float32 [batch, classes]; their softmax is the probabilities",
            "mlflow": "takes pixels themselves, uint8 [batch, height, width, channels]",
        },
        "trained": {
            "epochs": state["epoch"] + 1,
            **state["config"]["options"],
            "accuracy": {key: value for key, value in last.items() if f"/{predictor}/" in key},
        },
    }


def write(
    classifier: Classifier, description: dict[str, Any], names: list[str], folder: Path, trust: Trust
) -> list[str]:
    """Write all formats and compare what each answers with PyTorch; a row of a table for each.

    Raises:
        OSError: a file cannot be written; names it.
        RuntimeError: an answer differs by more than `TOLERANCE`.
    """
    (folder / "model.json").write_text(
        json.dumps(description, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    pixels = example_pixels(3, classifier.preprocessing)
    with torch.inference_mode():
        images = classifier.normalize(pixels)
        expected = {"logits": classifier.network(images), "probabilities": classifier(pixels)}
    rows = [f"{'format':<14}{'file':<20}{'MB':>8}  largest difference"]
    for name in names:
        form = FORMATS[name]
        path = folder / form.file
        with quiet():
            try:
                form.write(classifier, description, path)
            except OSError as error:
                raise OSError(error.errno, f"{form.file}: {error.strerror or error}") from error
            answer = form.run(path, pixels, images, trust)
        truth = expected[form.gives]
        if not truth.isfinite().all():
            raise ConfigError(
                f"checkpoint: this network answers with {form.gives} that are not finite: its training has"
                " failed. Name another checkpoint, such as previous.pt or best.pt beside it."
            )
        difference = (answer - truth).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, truth.abs().max().item()):
            raise RuntimeError(f"{form.file} gives other {form.gives} than PyTorch, by {difference:.1e}")
        size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
        rows.append(f"{name:<14}{form.file:<20}{size / 1e6:>8.2f}  {difference:.1e} in {form.gives}")
    return rows


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


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, and the remarks of exporters on their own workings."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


FORMATS = {
    "safetensors": Format("model.safetensors", ("safetensors",), write_safetensors, run_safetensors),
    "torch": Format("model.pt2", (), write_torch, run_torch),
    "onnx": Format("model.onnx", ("onnx", "onnxruntime", "onnxscript"), write_onnx, run_onnx),
    "mlflow": Format("mlflow", (), write_mlflow, run_mlflow, gives="probabilities"),
}
