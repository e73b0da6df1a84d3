"""Task `export`: one predictor of a checkpoint as a plain network, for other programs to run."""

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig

from okddip.assembly import NETWORKS, PEERS
from okddip.deployment.classifier import Classifier
from okddip.deployment.predictors import default_predictor, exportable_predictors, extract, rebuild
from okddip.deployment.preprocessing import Preprocessing
from okddip.errors import ConfigError, check_choice
from okddip.tasks.export.formats import FORMATS, example_pixels
from okddip.tasks.named_checkpoint import chosen_keys, open_checkpoint
from okddip.text import for_terminal
from okddip.trust import Trust, trust_of
from okddip.version import __version__

log = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of a format's outputs against PyTorch's; relative where those are larger than 1
# Groups that a checkpoint settles, and the command may not set
SETTLED = (
    *("method", "methods", "model", "dataset", "trainer", "optimizer", "scheduler"),
    *("experiment", "ablation", "seed"),
)


def export(config: DictConfig, build: Callable[..., Any]) -> str:
    """Write one predictor of a checkpoint into a new folder, and check that each file computes the same.

    The folder appears once it is complete: `model.json` describes the network and its preprocessing.

    Args:
        config: resolved; `checkpoint`, and the settings of `export`.
        build: not needed: no data is read.

    Returns:
        The folder.

    Raises:
        ConfigError: a setting that is not allowed, or a package that is not installed.
    """
    chosen_keys("export", SETTLED)
    if not isinstance(config.get("export"), DictConfig):
        raise ConfigError("export: is not in the configuration. See conf/task/export.yaml.")
    names = check_formats(config.export.formats)
    folder = new_folder(config.export.out or f"{HydraConfig.get().runtime.output_dir}/export")
    path, state = open_checkpoint(config)
    trust = trust_of(config)
    with quiet():  # warnings about a schedule concern training
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
    peer = predictor.removeprefix("ema/")
    if peer in method.predictors[: method.peers]:
        description |= describe_model(state, method.predictors.index(peer))
    if predictor == method.combination:
        description["combination"] = {"method": state["config"]["method"]}
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


def new_folder(out: object) -> Path:
    """The folder that the setting `export.out` names, which does not exist or is empty.

    Raises:
        ConfigError: there is something in it.
    """
    folder = Path(str(out)).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"export.out={folder}: exists already. Name a new folder, or remove this one.")
    return folder


def check_formats(names: Any) -> list[str]:
    """The formats that `export.formats` names.

    Raises:
        ConfigError: a format that does not exist, or one whose packages are not installed.
    """
    if not isinstance(names, list | tuple | ListConfig) or not names:
        raise ConfigError(f"export.formats={names}: must be a list of {', '.join(FORMATS)}.")
    for name in names:
        check_choice("export.formats", name, FORMATS)
        missing = [package for package in FORMATS[name].packages if find_spec(package) is None]
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
    if last.get("epoch") != state["epoch"]:  # with trainer.eval_every, of a run that was interrupted
        last = {}
    return {
        "okddip": __version__,
        "predictor": predictor,
        "parameters": sum(parameter.numel() for parameter in classifier.network.parameters()),
        **describe_model(state),
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
            "accuracy": {
                key: value
                for key, value in last.items()
                if key.partition("/")[2].rpartition("/")[0] == predictor
            },
        },
    }


def describe_model(state: dict[str, Any], peer: int | None = None) -> dict[str, Any]:
    """What is built: the checkpoint's model; where its peers differ, those of all of them, or of one."""
    model = state["config"]["model"]
    names = model.get(PEERS)
    if not names:
        return {"model": {key: value for key, value in model.items() if key != PEERS}}
    if peer is None:
        return {"model": model}
    return {"model": model[NETWORKS][peer], "architecture": names[peer]}


def write(
    classifier: Classifier, description: dict[str, Any], names: list[str], folder: Path, trust: Trust
) -> list[str]:
    """Write all formats and compare the outputs of each with PyTorch's; returns the rows of a table.

    Raises:
        ConfigError: the logits of the network are not finite.
        OSError: a file cannot be written; names it.
        RuntimeError: an output differs by more than `TOLERANCE`.
    """
    (folder / "model.json").write_text(
        json.dumps(description, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    pixels = example_pixels(3, classifier.preprocessing)
    with torch.inference_mode():
        images = classifier.normalize(pixels)
        expected = {"logits": classifier.network(images), "probabilities": classifier(pixels)}
    if not expected["logits"].isfinite().all():
        raise ConfigError(
            "checkpoint: the logits of this network are not finite: its training has failed. Name another"
            " checkpoint, such as previous.pt or best.pt in the same folder."
        )
    rows = [f"{'format':<14}{'file':<20}{'MB':>8}  largest difference"]
    for name in names:
        format_ = FORMATS[name]
        path = folder / format_.file
        with quiet():
            try:
                format_.write(classifier, description, path)
            except OSError as error:
                raise OSError(error.errno, f"{format_.file}: {error.strerror or error}") from error
            outputs = format_.run(path, pixels, images, trust)
        expected_outputs = expected[format_.outputs]
        difference = (outputs - expected_outputs).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected_outputs.abs().max().item()):
            raise RuntimeError(
                f"{format_.file} gives other {format_.outputs} than PyTorch, by {difference:.1e}"
            )
        size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
        rows.append(f"{name:<14}{format_.file:<20}{size / 1e6:>8.2f}  {difference:.1e} in {format_.outputs}")
    return rows


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, and without what exporters log about their own work."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
