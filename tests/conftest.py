import os

# Tests run in parallel, and so does each on its own; small networks gain nothing from threads.
os.environ["OMP_NUM_THREADS"] = "1"

import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from PIL import Image

from okddip.assembly import CONFIG_HOME, make
from okddip.main import build, cli
from okddip.methods.base import Method
from okddip.run.parts import Parts
from okddip.signals import STOP_SIGNALS
from okddip.tasks.benchmark.synthetic import DataShape, with_synthetic_images

pytest_plugins = ("mlflow_stores", "exported_networks")

# the suite's numbers must not depend on a store or a cache that the developer has
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
    os.environ.pop(name, None)


def quick_first(*values: Any) -> list[Any]:
    """For parametrize: the first value is tried by default, the others with the slow tests."""
    return [values[0], *(pytest.param(value, marks=pytest.mark.slow) for value in values[1:])]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in a folder of its own: runs, stores and caches of relative paths go there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OKDDIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def unchanged_signal_handlers() -> Iterator[None]:
    """A handler that a test leaves behind decides how signals end in the tests after it."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def configured() -> Callable[..., DictConfig]:
    """Compose the program's configuration with overrides."""

    def configure(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(CONFIG_HOME / "conf"), version_base="1.3"):
            config = compose("config", list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        return config

    return configure


@pytest.fixture
def synthetic_parts(configured: Callable[..., DictConfig]) -> Callable[..., Parts]:
    """Build what a command line describes, on small synthetic images."""

    def build_parts(*overrides: str) -> Parts:
        config = configured("tracking=none", "trainer.device=cpu", *overrides)
        return build(with_synthetic_images(config, DataShape((8, 8), 3, 10), {}))

    return build_parts


@pytest.fixture
def make_method(configured: Callable[..., DictConfig]) -> Callable[..., Method]:
    """Build a method from its option file: make_method("okddip", "method.peers=3", feature_dim=16)."""

    def make_one(option: str, *overrides: str, **shape: Any) -> Method:
        config = configured(f"method={option}", *overrides)
        classes = shape.pop("classes", 10)
        dimensions = {"feature_dim": 64, "trunk_channels": 32, "epochs": 300} | shape
        method = make("method", config.method, **dimensions)
        method.prepare(classes)
        return method

    return make_one


def folders_of_images(root: Path, *classes: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(8):
                pixels = rng.integers(256, size=(16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")


@contextmanager
def no_room(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes: writing fails then as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Answer(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def okddip(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run the program in this process: okddip("method=baseline", "seed=1")."""

    def run(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["okddip", *arguments])
        code = 0
        try:
            cli()
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        return Answer(code, *capfd.readouterr())

    return run
