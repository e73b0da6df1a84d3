"""Runs whose peers are networks of different architectures."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Answer

import okddip as package
from okddip.data.sources import digits
from okddip.deployment.predictors import rebuild
from okddip.training import checkpoint
from okddip.trust import Trust

Okddip = Callable[..., Answer]

PAIR = (
    *("method=dml", "model.peers=[resnet8,resnet20]", "dataset=digits", "scheduler=constant"),
    *("trainer.limit_batches=3", "optimizer.lr=0.02", "tracking=none"),
)


@pytest.mark.slow
def test_each_of_two_networks_is_trained_evaluated_resumed_and_exported(okddip: Okddip) -> None:
    answer = okddip(*PAIR, "trainer.epochs=1", "hydra.run.dir=run")
    assert answer.code == 0, answer.err
    assert "model      resnet8, 77,754 parameters + resnet20, 272,186 parameters; trained" in answer.out
    assert re.search(r"^peer0 \(resnet8\) +\d.*\npeer1 \(resnet20\) +\d", answer.out, re.MULTILINE)

    answer = okddip(*PAIR, "trainer.epochs=2", "trainer.resume=run")
    assert answer.code == 0, answer.err
    assert "resumes after epoch 1" in answer.out

    answer = okddip("task=evaluate", "checkpoint=run", "tracking=none", "hydra.run.dir=evaluation")
    assert answer.code == 0, answer.err
    assert re.search(r"^peer1 \(resnet20\) +\d", answer.out, re.MULTILINE)
    report = json.loads(Path("evaluation/evaluation.json").read_text())
    assert report["models"] == {"peer0": "resnet8", "peer1": "resnet20"}
    state = checkpoint.load(Path("run/last.pt"))
    for peer in ("peer0", "peer1"):
        assert report["metrics"][f"{peer}/top1"] == state["history"]["last"][f"test/{peer}/top1"]

    group, _ = rebuild(state, Trust(), "run")
    pixels = digits(image_size=16).test.images[:5]
    mean, std = state["mean"][0], state["std"][0]
    images = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        logits = group.eval()(images).logits
        for predictor, expected in (("peer0", logits[0]), ("peer1", logits[1]), ("ensemble", logits.mean(0))):
            to = (f"export.predictor={predictor}", f"export.out={predictor}", "export.formats=[safetensors]")
            answer = okddip("task=export", "checkpoint=run", *to)
            assert answer.code == 0, answer.err
            assert torch.equal(package.load(predictor).network(images), expected)
    described = [json.loads(Path(peer, "model.json").read_text()) for peer in ("peer0", "peer1")]
    assert [each["architecture"] for each in described] == ["resnet8", "resnet20"]
    assert [each["model"]["depth"] for each in described] == [8, 20]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["okddip", "pcl"])
def test_features_of_different_lengths_are_trained_and_exported(okddip: Okddip, method: str) -> None:
    option = Path("own/model/wide.yaml")
    option.parent.mkdir(parents=True)
    option.write_text("_target_: okddip.models.resnet.resnet\ndepth: 11\nblock: bottleneck\n")
    answer = okddip(
        *("--config-dir=own", *PAIR, f"method={method}", "model.peers=[resnet8,wide,resnet14]"),
        *("trainer.epochs=1", "hydra.run.dir=run", "method.ema_decay=0.9"),
    )
    assert answer.code == 0, answer.err
    predictor = {"okddip": "leader", "pcl": "classifier"}[method]
    to = (f"export.predictor={predictor}", "export.out=out", "export.formats=[safetensors]")
    answer = okddip("task=export", "checkpoint=run", *to)  # without the option file
    assert answer.code == 0, answer.err


@pytest.mark.slow
def test_a_model_that_takes_no_images_so_small_is_named(okddip: Okddip) -> None:
    answer = okddip(*PAIR, "model.peers=[resnet8,vgg16]", "trainer.epochs=1")
    assert answer.code == 1
    assert "model=vgg16: takes images of at least 32 pixels a side" in answer.err
