"""Task export: what it writes answers as the trained network does."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnxruntime
import pytest
import torch
from conftest import Answer, no_room
from models.model_options import factory, parameters
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import okddip as package
from okddip.assembly import make
from okddip.data.sources import digits, image_folder
from okddip.data.streaming import StreamingDataset
from okddip.deployment.classifier import Classifier
from okddip.deployment.predictors import rebuild
from okddip.deployment.preprocessing import Preprocessing
from okddip.errors import ConfigError
from okddip.models.backbone import Backbone
from okddip.models.group import PeerGroup
from okddip.tasks.export import task as exporting
from okddip.training import checkpoint
from okddip.trust import Trust

Okddip = Callable[..., Answer]
Trained = Callable[..., dict[str, Any]]
REPOSITORY = Path(__file__).parents[2]
MEAN, STD = 0.3, 0.4


@pytest.fixture
def trained(configured: Callable[..., DictConfig]) -> Trained:
    """Write run/last.pt, of the digits, with statistics as if trained; returns what it holds."""

    def write(*overrides: str, scores: dict[str, float] | None = None) -> dict[str, Any]:
        config = configured("dataset=digits", "model=resnet8", *overrides)
        OmegaConf.resolve(config)
        make_backbone = partial(make, "model", config.model, num_classes=10, in_channels=1)
        method = make("method", config.method, feature_dim=64, trunk_channels=32, epochs=300)
        group = PeerGroup(make_backbone, method.peers, method.structure, method.rescale)
        randomize_statistics(group)
        state = {
            "version": package.__version__,
            "config": OmegaConf.to_container(config),
            "classes": [f"digit {digit}" for digit in range(10)],
            "channels": 1,
            "image_size": [16, 16],
            "mean": [MEAN],
            "std": [STD],
            "epoch": 7,
            "history": {"last": {"epoch": 7, **(scores or {})}},
            "group": group.state_dict(),
            "method": method.state_dict(),
        }
        Path("run").mkdir(exist_ok=True)
        checkpoint.save(state, Path("run"), best=True)
        return state

    return write


def randomize_statistics(module: nn.Module) -> None:
    """As training would have left them: else batch norm is the identity."""
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)


def logits_in_training(state: dict[str, Any], images: Tensor) -> Tensor:
    """Of all peers, [P, B, K], by the group that was trained."""
    group, _ = rebuild(state, Trust(), "run")
    group.eval()
    with torch.no_grad():
        return group(images).logits


def normalised(pixels: Tensor) -> Tensor:
    return (pixels.permute(0, 3, 1, 2) / 255 - MEAN) / STD


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
    assert torch.equal(package.load("out").network(images), logits_in_training(state, images)[index])


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


@pytest.fixture
def exported(okddip: Okddip, trained: Trained) -> Path:
    trained()
    okddip("task=export", "checkpoint=run", "export.formats=[safetensors]", "export.out=out")
    return Path("out")


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


def test_importing_the_package_stays_light() -> None:
    probe = (
        "import sys, okddip; okddip.load;"
        "heavy = {'torch', 'numpy', 'hydra', 'mlflow'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    finished = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=REPOSITORY)
    assert finished.returncode == 0, finished.stderr


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


@pytest.mark.slow
def test_a_server_classifies_a_real_image(okddip: Okddip, trained: Trained, tmp_path: Path) -> None:
    trained()
    okddip("task=export", "checkpoint=run", "export.formats=[safetensors,mlflow]", "export.out=out")
    source = digits()
    file = io.BytesIO()
    Image.fromarray(source.test.images[0, ..., 0].numpy()).save(file, "PNG")
    image = np.asarray(Image.open(file))[None, ..., None]  # [1, 16, 16, 1]

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "out/mlflow"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (tmp_path / "server.log").open("w") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", server, tmp_path / "server.log")
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"inputs": image.tolist()}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            [prediction] = json.load(response)["predictions"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    loaded = package.load("out")
    assert [prediction["label"]] == loaded.predict(image)
    expected = loaded.predict_proba(image)[0].tolist()
    assert prediction["probabilities"] == pytest.approx(expected, abs=1e-5)


def wait_for(url: str, server: subprocess.Popen, output: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert server.poll() is None, output.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(output.read_text())
