"""Task export: what it writes answers as the trained network does."""

import json
from pathlib import Path

import mlflow
import onnxruntime
import pytest
import torch
from conftest import no_room
from exported_networks import MEAN, STD, Okddip, Trained, logits_in_training, normalised, randomize_statistics
from models.model_options import factory, parameters
from omegaconf import OmegaConf
from safetensors.torch import load_file

import okddip as package
from okddip.assembly import make
from okddip.data.sources import digits
from okddip.deployment.classifier import Classifier
from okddip.deployment.predictors import extract, rebuild
from okddip.deployment.preprocessing import Preprocessing
from okddip.models.backbone import Backbone
from okddip.tasks.export import task as exporting
from okddip.training import checkpoint
from okddip.trust import Trust

REPOSITORY = Path(__file__).parents[2]


@torch.no_grad()
def test_every_format_answers_as_the_leader(okddip: Okddip, trained: Trained) -> None:
    state = trained()
    answer = okddip("task=export", "checkpoint=run", "export.out=out")
    assert answer.code == 0, answer.err
    assert "leader of run/last.pt, 77,754 parameters" in answer.out
    assert "UserWarning" not in answer.err

    loaded = package.load("out")
    session = onnxruntime.InferenceSession("out/model.onnx")
    program = torch.export.load("out/model.pt2").module()
    served = mlflow.pyfunc.load_model("out/mlflow")
    for batch in (1, 5):
        pixels = digits().test.images[:batch]
        images = normalised(pixels)
        leader = logits_in_training(state, images)[3]
        assert torch.equal(loaded.network(images), leader)
        torch.testing.assert_close(program(images), leader, atol=1e-5, rtol=1e-5)
        [logits] = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), leader, atol=1e-4, rtol=1e-4)
        table = served.predict(pixels.numpy())
        probabilities = torch.tensor(table["probabilities"].tolist())
        torch.testing.assert_close(probabilities, leader.softmax(-1), atol=1e-5, rtol=1e-5)
        assert table["label"].tolist() == loaded.predict(pixels)

    description = json.loads(Path("out/model.json").read_text())
    plain = make("model", OmegaConf.create(state["config"]["model"]), num_classes=10, in_channels=1)
    assert description["parameters"] == parameters(loaded.network) == parameters(plain)
    assert load_file("out/model.safetensors").keys() == plain.state_dict().keys()
    assert len({file.stat().st_mode for file in Path("out").glob("model.*")}) == 1
    assert description["predictor"] == "leader"
    assert description["classes"] == state["classes"]
    assert description["preprocessing"] == {
        "image_size": [16, 16],
        "channels": 1,
        "resize": None,
        "mean": [MEAN],
        "std": [STD],
    }
    assert json.loads(session.get_modelmeta().custom_metadata_map["okddip"]) == description


@torch.no_grad()
@pytest.mark.parametrize("structure", ["branch", pytest.param("network", marks=pytest.mark.slow)])
def test_the_ensemble_is_the_mean_of_the_auxiliary_peers(
    okddip: Okddip, trained: Trained, structure: str
) -> None:
    state = trained(f"method.structure={structure}")
    answer = okddip(
        *("task=export", "checkpoint=run", "export.predictor=ensemble"),
        *("export.formats=[safetensors,torch,onnx]", "export.out=out"),
    )
    assert answer.code == 0, answer.err
    images = torch.randn(3, 1, 16, 16)
    ensemble = logits_in_training(state, images)[:3].mean(0)
    loaded = package.load("out")
    assert torch.equal(loaded.network(images), ensemble)
    program = torch.export.load("out/model.pt2").module()
    torch.testing.assert_close(program(images), ensemble, atol=1e-5, rtol=1e-5)
    [logits] = onnxruntime.InferenceSession("out/model.onnx").run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), ensemble, atol=1e-4, rtol=1e-4)
    group, _ = rebuild(state, Trust(), "run")
    assert parameters(loaded.network) == parameters(group) - parameters(group.peers[3])


@torch.no_grad()
@pytest.mark.parametrize(
    ("option", "predictor"),
    [
        ("ffl", "fusion"),
        pytest.param("one", "teacher", marks=pytest.mark.slow),
        pytest.param("pcl", "classifier", marks=pytest.mark.slow),
        ("pcl", "ema/peer1"),
        pytest.param("baseline method.ema_decay=0.9", "ema/student", marks=pytest.mark.slow),
    ],
)
def test_what_a_method_combines_or_averages_is_exported(
    okddip: Okddip, trained: Trained, option: str, predictor: str
) -> None:
    state = trained(*f"method={option}".split())
    command = ("task=export", "checkpoint=run", "export.formats=[safetensors,torch]", "export.out=out")
    answer = okddip(*command, f"export.predictor={predictor}")
    assert answer.code == 0, answer.err
    group, method = (module.eval() for module in rebuild(state, Trust(), "run"))
    images = torch.randn(3, 1, 16, 16)
    losses = method(group(images), torch.zeros(3, dtype=torch.long), torch.ones(()))
    expected = losses.predictions[method.measured.index(predictor)]
    torch.testing.assert_close(package.load("out").network(images), expected)
    torch.testing.assert_close(torch.export.load("out/model.pt2").module()(images), expected)


@torch.no_grad()
@pytest.mark.parametrize("predictor", ["ensemble", "classifier"])
def test_an_exported_ensemble_computes_no_moving_averages(trained: Trained, predictor: str) -> None:
    group, method = rebuild(trained("method=pcl"), Trust(), "run")
    asked = []
    group.averages[0].group.register_forward_hook(lambda *_: asked.append(1))
    group.eval()(torch.zeros(1, 1, 16, 16))
    assert len(asked) == 1
    extract(group, method, predictor)(torch.zeros(1, 1, 16, 16))
    assert len(asked) == 1
    assert group.averages  # the trained group's own are still there


@torch.no_grad()
@pytest.mark.parametrize(
    ("overrides", "predictor", "index"),
    [
        (["method=baseline"], "student", 0),
        (["method=kd", "method.teacher=gone.pt"], "student", 0),
        (["method=independent"], "peer0", 0),
        (["method=dml"], "peer0", 0),
        (["method=cl_ilr"], "peer0", 0),
        (["method=one"], "peer0", 0),
        (["method=okddip", "method.peers=3"], "leader", 2),
        (["method=okddip", "method.leader=false"], "peer0", 0),
        (["method=kdcl"], "peer0", 0),
        (["method=ffl"], "peer0", 0),
        (["method=pcl"], "ema/peer0", 0),
        (["method=dml", "method.ema_decay=0.9"], "peer0", 0),
    ],
)
def test_without_a_choice_the_leader_or_the_first_peer_is_kept(
    okddip: Okddip, trained: Trained, overrides: list[str], predictor: str, index: int
) -> None:
    state = trained(*overrides)
    answer = okddip("task=export", "checkpoint=run", "export.formats=[safetensors]", "export.out=out")
    assert answer.code == 0, answer.err
    assert f"{predictor} of run/last.pt, 77,754 parameters" in answer.out
    images = torch.randn(2, 1, 16, 16)
    group, method = (module.eval() for module in rebuild(state, Trust(), "run"))
    output = group(images)
    expected = output.averages if predictor in method.averaged else output.logits
    assert torch.equal(package.load("out").network(images), expected[index])


@torch.no_grad()
def test_peers_are_judged_by_the_validation_set(okddip: Okddip, trained: Trained) -> None:
    scores = {f"val/peer{i}/top1": top1 for i, top1 in enumerate((50.0, 60.0, 70.0, 65.0))}
    scores |= {f"test/peer{i}/top1": top1 for i, top1 in enumerate((90.0, 80.0, 70.0, 60.0))}
    state = trained("method=dml", scores=scores)
    images = torch.randn(2, 1, 16, 16)
    for choice, index in (("null", 2), ("peer1", 1)):
        command = ("task=export", "checkpoint=run", "export.formats=[safetensors]")
        answer = okddip(*command, f"export.predictor={choice}", f"export.out=out-{choice}")
        assert answer.code == 0, answer.err
        assert torch.equal(
            package.load(f"out-{choice}").network(images), logits_in_training(state, images)[index]
        )
    accuracy = json.loads(Path("out-peer1/model.json").read_text())["trained"]["accuracy"]
    assert accuracy == {"val/peer1/top1": 60.0, "test/peer1/top1": 80.0}

    # no accuracy where the last epoch that was evaluated is an earlier one
    state = checkpoint.load(Path("run/last.pt"))
    state["epoch"] += 1
    checkpoint.save(state, Path("run"), best=False)
    okddip("task=export", "checkpoint=run", "export.formats=[safetensors]", "export.out=later")
    trained_then = json.loads(Path("later/model.json").read_text())["trained"]
    assert (trained_then["epochs"], trained_then["accuracy"]) == (9, {})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "checkpoint: not given. Add checkpoint=..."),
        (["checkpoint=nowhere.pt"], "checkpoint=nowhere.pt: there is no such checkpoint"),
        (["checkpoint=text.pt"], "text.pt"),
        (
            ["checkpoint=run", "export.predictor=peer3"],
            "export.predictor=peer3: must be one of peer0, peer1, peer2, leader, ensemble",
        ),
        (
            ["checkpoint=run", "export.formats=[onnx,tflite]"],
            "export.formats=tflite: must be one of safetensors, torch, onnx, mlflow",
        ),
        (["checkpoint=run", "export.formats=onnx"], "export.formats=onnx: must be a list of"),
        (["checkpoint=run", "export.formats=[]"], "export.formats=[]: must be a list of"),
        (["checkpoint=run", "export.out=run"], "export.out=run: exists already"),
        (["checkpoint=run", "export.out=text.pt/out"], "export.out=text.pt/out"),
        (["checkpoint=run", "method=dml"], "method: is settled by the checkpoint"),
        (["checkpoint=run", "dataset=digits"], "dataset: is settled by the checkpoint"),
        (["checkpoint=run", "export.formats=5"], "export.formats=5: must be a list of"),
        (["checkpoint=run", "export=null"], "export: is not in the configuration"),
        (["checkpoint=ruined.pt"], "holds numbers that are not finite (group: "),
        (["checkpoint=huge.pt"], "the logits of this network are not finite"),
    ],
)
def test_bad_input_is_refused_by_name(
    okddip: Okddip, trained: Trained, overrides: list[str], message: str
) -> None:
    state = trained()
    for name, factor in (("ruined", float("nan")), ("huge", 1e20)):
        torch.save({**state, "group": {key: x * factor for key, x in state["group"].items()}}, f"{name}.pt")
    Path("text.pt").write_text("no checkpoint")
    answer = okddip("task=export", "export.formats=[safetensors]", *overrides)
    assert answer.code == 1
    assert message in answer.err
    assert "Traceback" not in answer.err


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(
    okddip: Okddip, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained()
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    answer = okddip("task=export", "checkpoint=run", "export.out=out")
    assert answer.code == 1
    assert "safetensors needs safetensors. Install with pip install 'okddip[export]'" in answer.err


def test_a_format_that_answers_otherwise_leaves_nothing(
    okddip: Okddip, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained()
    wrong = exporting.FORMATS["torch"]._replace(run=lambda path, pixels, *_: torch.zeros(len(pixels), 10))
    monkeypatch.setitem(exporting.FORMATS, "torch", wrong)
    answer = okddip("task=export", "checkpoint=run", "export.formats=[torch]", "export.out=out")
    assert answer.code == 1
    assert "model.pt2 gives other logits than PyTorch" in answer.err
    assert not Path("out").exists()
    assert not list(Path().glob(".export-*"))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("safetensors", "model.safetensors"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("torch", "model.pt2"), ("onnx", "model.onnx"), ("mlflow", "mlflow"))
        ),
    ],
)
def test_a_full_disk_is_named_and_leaves_nothing(
    okddip: Okddip, trained: Trained, name: str, file: str
) -> None:
    trained()
    with no_room(100_000):
        answer = okddip("task=export", "checkpoint=run", f"export.formats=[{name}]", "export.out=out")
    assert answer.code == 1
    assert f"export.out=out: cannot be written ({file}: File too large)" in answer.err
    assert "Traceback" not in answer.err
    assert not Path("out").exists()
    assert not list(Path().glob(".export-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "option",
    [
        *("resnet32", "vgg16", "densenet40_12", "resnet18", "resnext50_32x4d"),
        *("torchvision mobilenet_v2 features.13", "torchvision convnext_tiny features.5"),
        "torchvision densenet121 features.norm5",
    ],
)
def test_every_family_of_models_can_be_written_as_a_program_and_as_onnx(option: str, tmp_path: Path) -> None:
    option, *torchvision = option.split()
    network: Backbone = factory(option, **dict(zip(("name", "split"), torchvision, strict=False)))().eval()
    randomize_statistics(network)
    size = max(32, network.minimum_size)
    preprocessing = Preprocessing((size, size), 3, None, (0.5,) * 3, (0.25,) * 3)
    classifier = Classifier(network, [str(i) for i in range(10)], preprocessing)
    rows = exporting.write(classifier, {}, ["torch", "onnx"], tmp_path, Trust())
    assert len(rows) == 3
