"""Every method with every kind of model, on fake tensors: shapes without arithmetic."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from okddip.assembly import CONFIG_HOME, make
from okddip.checks import check
from okddip.errors import ConfigError
from okddip.main import make_without_data
from okddip.methods.base import Method
from okddip.training.peers import make_group

METHODS = ["okddip", "baseline", "independent", "kd", "dml", "cl_ilr", "one", "kdcl", "ffl", "pcl"]
MODELS = sorted(path.stem for path in (CONFIG_HOME / "conf" / "model").glob("*.yaml"))
SMALL_MODELS = ["resnet8", "vgg16", "densenet40_12", "resnet18", "torchvision"]


def option(model: str) -> list[str]:
    named = ["model.name=resnet18", "model.split=layer3"] if model == "torchvision" else []
    return [f"model={model}", *named]


def predictions(config: DictConfig) -> tuple[Method, torch.Size]:
    make_backbone = partial(make, "model", config.model, num_classes=7, in_channels=3)
    # networks that are traced use fake tensors themselves
    with nullcontext() if config.options.model == "torchvision" else FakeTensorMode():
        probe = make_backbone()
        method = make("method", config.method, **probe.dimensions, epochs=config.trainer.epochs)
        method.prepare(7)
        group = make_group(make_backbone, method, probe if config.method.get("teacher") else None)
        images, labels = torch.zeros(4, 3, 64, 64), torch.zeros(4, dtype=torch.long)
        return method, method(group(images), labels, torch.ones(())).predictions.shape


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["branch", "network"])
@pytest.mark.parametrize("model", MODELS)
def test_okddip_takes_every_model_in_both_structures(
    configured: Callable[..., DictConfig], model: str, structure: str
) -> None:
    method, shape = predictions(configured(*option(model), f"method.structure={structure}", "method.peers=3"))
    assert shape == (4, 4, 7)
    assert len(method.predictors) == 4


@pytest.mark.slow
@pytest.mark.parametrize("model", SMALL_MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_every_kind_of_model(
    configured: Callable[..., DictConfig], name: str, model: str
) -> None:
    extra = ["method.teacher=given"] if name == "kd" else []
    method, shape = predictions(configured(f"method={name}", *option(model), *extra))
    assert shape == (len(method.measured), 4, 7)


@pytest.mark.parametrize("peers", [2, 3, 5, 8])
@pytest.mark.parametrize("name", ["okddip", "independent", "dml", "cl_ilr", "one", "kdcl", "ffl", "pcl"])
def test_any_number_of_peers(configured: Callable[..., DictConfig], name: str, peers: int) -> None:
    extra = ["method.leader=false"] if name == "okddip" and peers == 2 else []
    overrides = [f"method={name}", f"method.peers={peers}", "model=resnet8", *extra]
    method, shape = predictions(configured(*overrides))
    assert shape[0] == len(method.measured) >= peers + 1


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        ("cifar10", ("cifar10", "resnet32", 300, 128, 0.1, 5e-4, [150, 225])),
        ("cifar100", ("cifar100", "resnet32", 300, 128, 0.1, 5e-4, [150, 225])),
        ("imagenet_resnet34", ("imagenet", "resnet34", 90, 256, 0.1, 1e-4, [30, 60])),
    ],
)
def test_experiments_are_the_papers(
    configured: Callable[..., DictConfig], experiment: str, expected: tuple[object, ...]
) -> None:
    config = configured(f"experiment={experiment}")
    assert expected == (
        *(config.options.dataset, config.options.model, config.trainer.epochs, config.trainer.batch_size),
        *(config.optimizer.lr, config.optimizer.weight_decay, config.scheduler.milestones),
    )
    assert config.optimizer.nesterov
    assert (config.method.peers, config.method.temperature, config.method.alpha) == (4, 3.0, 1.0)
    other = configured(f"experiment={experiment}", "method=dml", "model=vgg16")
    assert other.options == {"method": "dml", "model": "vgg16", "dataset": config.options.dataset}


GROUPS = {
    group: sorted(path.stem for path in (CONFIG_HOME / "conf" / group).glob("*.yaml"))
    for group in ("method", "dataset", "optimizer", "scheduler", "tracking", "ablation", "task")
} | {"model": ["resnet8", "vgg16", "torchvision"]}
KEYS_OF_EXPERIMENTS = ("optimizer", "scheduler")  # groups of whose options experiments set keys
SETS = [
    *(f"experiment={path.stem}" for path in sorted((CONFIG_HOME / "conf" / "experiment").glob("*.yaml"))),
    *(f"multirun_presets={path.stem}" for path in sorted((CONFIG_HOME / "multirun_presets").glob("*.yaml"))),
]


@pytest.mark.parametrize(
    ("settings", "group"),
    [
        pytest.param(
            settings,
            group,
            marks=()
            if settings.startswith("experiment") and group in KEYS_OF_EXPERIMENTS
            else pytest.mark.slow,
        )
        for settings in SETS
        for group in GROUPS
        if settings.startswith("experiment") or group in KEYS_OF_EXPERIMENTS
    ],
)
def test_every_experiment_and_preset_takes_every_option_or_says_what_to_give(
    configured: Callable[..., DictConfig], settings: str, group: str
) -> None:
    refusals = []
    for name in GROUPS[group]:
        given = [f"{group}={name}", "dataset.root=images", "methods.teacher=given", "trainer.device=cpu"]
        if group == "task":
            given.append("++checkpoint=last.pt")
        if name == "torchvision":
            given += ["model.name=resnet18", "model.split=layer3"]
        config = configured(settings, *given)
        try:
            check(config)
            _, schedule, *_ = make_without_data(config)
            assert 0 <= schedule(0) <= 1
        except ConfigError as error:
            refusals.append(str(error))
    assert [text for text in refusals if not re.match(r"(ablation|method|dataset)[.\w]*[ =:]", text)] == []


def test_the_imagenet_experiment_trains_on_folders_of_images(okddip: Callable[..., object]) -> None:
    for split in ("train", "val"):
        for name, colour in (("cat", (200, 30, 30)), ("dog", (30, 30, 200))):
            folder = Path("imagenet") / split / name
            folder.mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (40 + index, 50), colour).save(folder / f"{index}.jpg")
    answer = okddip(
        *("experiment=imagenet_resnet34", "dataset.root=imagenet", "model=resnet18", "method=independent"),
        *("method.peers=2", "trainer.epochs=1", "trainer.batch_size=4", "dataset.image_size=64"),
        *("dataset.resize=72", "dataset.workers=0", "tracking=none", "hydra.run.dir=run"),
    )
    assert answer.code == 0, answer.err
    assert "6 train, 6 test images of 3x64x64, 2 classes" in answer.out
