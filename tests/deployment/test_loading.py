"""okddip.load: what an export must be to be read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import okddip as package
from okddip.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]


def test_damaged_weights_are_refused_by_name(exported: Path) -> None:
    weights = (exported / "model.safetensors").read_bytes()
    for damaged in (weights[:-100], weights[:50], b"", b"no weights", weights[8:]):
        (exported / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ConfigError, match="out: is damaged"):
            package.load("out")
    (exported / "model.safetensors").unlink()
    for nothing in ("out", "run", "nowhere"):
        with pytest.raises(ConfigError, match=f"{nothing}: holds no exported network"):
            package.load(nothing)


@pytest.mark.parametrize(
    "change",
    [
        *({"model": None}, {"model": {}}, {"model": "resnet8"}),
        *({"model": {"_target_": "okddip.models.resnet.resnet", "depth": 9}}, {"ensemble": 7}),
        *({"classes": 10}, {"classes": ["a", "b"]}, {"ensemble": {"peers": 2}}, {"preprocessing": []}),
        {"preprocessing": {"image_size": [16], "channels": 1, "mean": [0.5], "std": [0.5]}},
        {"preprocessing": {"image_size": [16, "16"], "channels": 1, "mean": [0.5], "std": [0.5]}},
        {"preprocessing": {"image_size": [16, 16], "channels": 1, "mean": [0.5, 0.5], "std": [0.5]}},
        {"preprocessing": {"image_size": [16, 16], "channels": 1, "mean": ["a"], "std": [0.5]}},
    ],
)
def test_a_description_of_something_else_is_refused_by_name(exported: Path, change: dict[str, Any]) -> None:
    description = json.loads((exported / "model.json").read_text())
    (exported / "model.json").write_text(json.dumps(description | change))
    with pytest.raises(ConfigError, match="out: is damaged"):
        package.load("out")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"7", b"null", b"{}", b"\xff\xfe\x00"])
def test_a_description_that_is_none_is_refused_by_name(exported: Path, text: bytes) -> None:
    (exported / "model.json").write_bytes(text)
    with pytest.raises(ConfigError, match="out: is damaged"):
        package.load("out")


def test_importing_the_package_stays_light() -> None:
    probe = (
        "import sys, okddip; okddip.load;"
        "heavy = {'torch', 'numpy', 'hydra', 'mlflow'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    finished = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=REPOSITORY)
    assert finished.returncode == 0, finished.stderr
