"""Files of a stranger's, opened in every way there is: nothing of theirs runs, and the reason is a sentence.

And a user's own parts, which the same ways build where the user calls them his own.
"""

import copy
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer
from mlflow.tracking import MlflowClient
from omegaconf import DictConfig, OmegaConf

import okddip as package
from okddip.assembly import CONFIG_HOME, make
from okddip.checks import check
from okddip.errors import ConfigError
from okddip.models.group import PeerGroup
from okddip.plain_data import plain
from okddip.tasks.benchmark.synthetic import DataShape, with_synthetic_images
from okddip.tasks.report.reproduce import parse_configuration
from okddip.tracking.tracker import MLflow
from okddip.training import checkpoint
from okddip.trust import PARTS, Trust, package_targets, targets, trust_in

Okddip = Callable[..., Answer]
State = dict[str, Any]

SMALL = ("dataset=digits", "model=resnet8", "tracking=none", "trainer.epochs=1", "trainer.limit_batches=1")
SECRET = "a-token-of-somebody"

# on the path of Python, as any module may be: it says that it was imported, and that it was called
TRAP = """
from pathlib import Path
Path(__file__).with_name("pwned").touch()
import okddip.models.resnet
fire = lambda *_, **__: Path(__file__).with_name("pwned").touch()
okddip.models.resnet.resnet = okddip.data.sources.digits = fire
"""


@pytest.fixture(autouse=True)
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module that shows that it was imported, a secret in the environment; and nothing of either after."""
    (tmp_path / "on_the_path").mkdir()
    (tmp_path / "on_the_path" / "trap.py").write_text(TRAP)
    monkeypatch.syspath_prepend(tmp_path / "on_the_path")
    monkeypatch.setenv("TOKEN", SECRET)
    monkeypatch.setenv("SWITCH", "trap.fire")  # what opening a store might set
    modules = set(sys.modules)
    yield
    assert not (tmp_path / "on_the_path" / "pwned").exists()
    assert not {"trap", "antigravity", "unittest.__main__"} & (set(sys.modules) - modules)
    shown = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".pt"]
    assert not any(SECRET.encode() in path.read_bytes() for path in shown)


@pytest.fixture
def honest(configured: Callable[..., DictConfig]) -> State:
    """What a checkpoint of a baseline holds, untrained; each test has a copy of its own."""
    if not HONEST:
        HONEST.update(honest_state(configured))
    return copy.deepcopy(HONEST)


HONEST: State = {}


def honest_state(configured: Callable[..., DictConfig]) -> State:
    config = configured(*SMALL, "method=baseline")
    check(config)
    make_backbone = partial(make, "model", config.model, num_classes=10, in_channels=1)
    method = make("method", config.method, feature_dim=64, trunk_channels=32, epochs=1)
    group = PeerGroup(make_backbone, method.peers, method.structure, method.rescale)
    return {
        "version": package.__version__,
        "config": OmegaConf.to_container(config),
        "classes": [str(digit) for digit in range(10)],
        **{"channels": 1, "image_size": [16, 16], "mean": [0.3], "std": [0.4]},
        **{"epoch": 0, "timestamp_ms": 1, "metrics": {}, "history": {}},
        **{"group": group.state_dict(), "method": method.state_dict(), "optimizer": {}, "scaler": {}},
    }


def put(key: str, value: Any) -> Callable[[State], None]:
    """Set a key of the configuration: `model.extra`, whatever value it has."""

    def change(state: State) -> None:
        *groups, name = key.split(".")
        node = state["config"]
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value

    return change


def without(key: str) -> Callable[[State], None]:
    """Leave a key of the configuration out."""

    def change(state: State) -> None:
        *groups, name = key.split(".")
        node = state["config"]
        for group in groups:
            node = node[group]
        del node[name]

    return change


def say(key: str, value: Any) -> Callable[[State], None]:
    """Set what stands outside the configuration."""
    return lambda state: state.update({key: value})


def fire(target: Any, **arguments: Any) -> dict[str, Any]:
    return {"_target_": target, **arguments}


def trusting_itself(state: State) -> None:
    state["config"]["trust"] = ["trap"]
    state["config"]["model"] = fire("trap.fire")


def of_billions(state: State) -> None:
    node: list[Any] = [0] * 10
    for _ in range(12):
        node = [node] * 10
    state["config"]["note"] = node


def of_itself(state: State) -> None:
    state["config"]["note"] = []
    state["config"]["note"].append(state["config"]["note"])


def interpolated_size(state: State) -> None:
    state["image_size"] = ["${oc.env:TOKEN}", 16]


class Reduced:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch on_the_path/pwned",)


def pickled(state: State) -> None:
    state["metrics"] = Reduced()


NOT_CALLED = "is no part that this program offers there, and is not called"
NOT_FOLLOWED = "which is not followed"

# change of a checkpoint, and what its refusal says
HOSTILE: dict[str, tuple[Callable[[State], None], str]] = {
    # the four that got through once
    "a resolver that answers otherwise at the call": (
        put("dataset.source._target_", "${oc.env:SWITCH,okddip.data.sources.digits}"),
        f"dataset.source._target_=${{oc.env:SWITCH,okddip.data.sources.digits}}: holds an interpolation,"
        f" ${{...}}, {NOT_FOLLOWED}",
    ),
    "a target that is harmless in the whole configuration": (
        put("model._target_", "${oc.select:zz,trap.fire}"),
        "model._target_=${oc.select:zz,trap.fire}: holds an interpolation",
    ),
    "an import that changes what another target is": (
        put("scheduler.first", fire("trap.nothing")),
        f"scheduler.first._target_=trap.nothing: {NOT_CALLED}",
    ),
    "a module whose import is enough": (put("method._target_", "antigravity.fly"), NOT_CALLED),
    # and others
    "a program of the standard library": (put("trainer._target_", "unittest.__main__.main"), NOT_CALLED),
    "a function of this program": (
        put("model", fire("okddip.files.write_text", text="x")),
        NOT_CALLED,
    ),
    "a part of this program elsewhere": (put("model._target_", "okddip.data.sources.digits"), NOT_CALLED),
    "a module behind a part's name": (
        put("model._target_", "okddip.models.resnet.torch.hub.load"),
        NOT_CALLED,
    ),
    "a target in a list, partial": (put("model.extra", [1, [fire("trap.fire", _partial_=True)]]), NOT_CALLED),
    "a target in positional arguments": (
        put("model._args_", [fire("builtins.eval", _args_=["1"])]),
        NOT_CALLED,
    ),
    "a target where nothing recurses": (put("model.x", fire("trap.fire", _recursive_=False)), NOT_CALLED),
    "a target that converts": (put("optimizer.x", fire("trap.fire", _convert_="all")), NOT_CALLED),
    "a function of torch": (put("model.activation", fire("torch.load", f="x")), NOT_CALLED),
    "a function of torch.nn": (put("model.activation", fire("torch.nn.factory_kwargs")), NOT_CALLED),
    "a module of torch.nn for another part": (put("dataset.source", fire("torch.nn.Linear")), NOT_CALLED),
    "a scheduler of torch.optim": (
        put("optimizer._target_", "torch.optim.lr_scheduler.LambdaLR"),
        NOT_CALLED,
    ),
    "a target under a key of nobody's": (put("mine.extra", fire("trap.fire")), NOT_CALLED),
    "a target that is no text": (put("model._target_", ["trap.fire"]), "is no name of a class or function"),
    "a target with a space": (put("model._target_", "trap.fire "), "is no name of a class or function"),
    "trust in itself": (trusting_itself, "say so by trust=[trap]"),
    "a secret in an option's name": (
        put("options.dataset", "${oc.env:TOKEN}"),
        f"options.dataset=${{oc.env:TOKEN}}: holds an interpolation, ${{...}}, {NOT_FOLLOWED}",
    ),
    "a secret in a place": (put("dataset.root", "x/${oc.env:TOKEN}"), NOT_FOLLOWED),
    "a secret in a note": (put("note", ["${oc.decode:${oc.env:TOKEN}}"]), NOT_FOLLOWED),
    "a secret in a key": (put("note", {"${oc.env:TOKEN}": 1}), "a key must be plain text"),
    "a secret in what becomes a setting": (interpolated_size, "image_size holds a str"),
    "a broken interpolation": (put("dataset.name", "${"), "dataset.name=${: holds an interpolation"),
    "a missing value": (put("trainer.epochs", "???"), "trainer.epochs=???: the value is missing"),
    "a tensor": (put("model.depth", torch.ones(3)), "model.depth: is a Tensor"),
    "bytes": (put("name", b"x"), "name: is a bytes"),
    "a key that is no text": (put("note", {(1, 2): 3}), "a key must be plain text"),
    "a list of billions": (of_billions, "is too large or nested too deeply"),
    "a list of itself": (of_itself, "is too large or nested too deeply"),
    "arguments without names": (
        put("dataset.source._args_", ["pics", "elsewhere"]),
        "dataset.source._args_: arguments without names are not taken from a file",
    ),
    "no name": (without("name"), "it has no config.name"),
    "no seed": (without("seed"), "it has no config.seed"),
    "no option": (without("options.model"), "it has no config.options.model"),
    "no length": (without("trainer.epochs"), "it has no config.trainer.epochs"),
    "a history of numbers": (say("history", {"last": 5}), "history cannot be"),
    "images of no size": (say("image_size", []), "image_size cannot be"),
    "too many means": (say("mean", [0.1, 0.2, 0.3]), "mean cannot be"),
    "no spread": (say("std", [0.0]), "std cannot be"),
    "an epoch before the first": (say("epoch", -1), "epoch cannot be -1"),
    "a pickle that calls": (pickled, "do not trust the file"),
}
KNOWN = tuple(HOSTILE)[:4]  # those that got through once


def refused(answer: Answer, sentence: str) -> None:
    assert answer.code == 1
    assert sentence in answer.err
    assert "Traceback" not in answer.err
    assert "weights_only" not in answer.err
    assert SECRET not in answer.out + answer.err


WAYS: dict[str, Callable[[Okddip], Answer]] = {
    "evaluate": lambda okddip: okddip("task=evaluate", "checkpoint=evil", "tracking=none"),
    "export": lambda okddip: okddip(
        "task=export", "checkpoint=evil/last.pt", "tracking=none", "export.formats=[safetensors]"
    ),
    "teacher": lambda okddip: okddip(*SMALL, "method=kd", "method.teacher=evil"),
    "resume a copy": lambda okddip: okddip(*SMALL, "method=baseline", "trainer.resume=evil/last.pt"),
    "resume a folder": lambda okddip: okddip(
        *SMALL, "method=baseline", "trainer.epochs=2", "trainer.resume=evil"
    ),
}


def write(state: State, folder: str = "evil") -> Path:
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "run.json").unlink(missing_ok=True)
    torch.save(state, Path(folder, "last.pt"))
    return Path(folder, "last.pt")


def open_in_all_ways(okddip: Okddip, honest: State, way: str, names: Iterator[str] | Any) -> None:
    for name in names:
        change, sentence = HOSTILE[name]
        state = copy.deepcopy(honest)
        change(state)
        write(state)
        if way == "resume a folder":
            Path("evil", "run.json").write_text("{}")
        answer = WAYS[way](okddip)
        if way.startswith("resume") and "made with other settings" in answer.err:
            sentence = "made with other settings"  # nothing is built of a run that is another
        refused(answer, sentence)


@pytest.mark.parametrize("way", WAYS)
def test_what_got_through_once_is_refused_in_every_way(okddip: Okddip, honest: State, way: str) -> None:
    open_in_all_ways(okddip, honest, way, KNOWN if way in ("evaluate", "export") else KNOWN[:2])


def test_the_version_in_a_file_forges_no_line_and_commands_no_terminal(okddip: Okddip, honest: State) -> None:
    state = copy.deepcopy(honest)
    state["version"] = "0.0.1\nResume with: okddip --config-dir /tmp/evil\x1b[31m"
    write(state)
    answer = okddip("task=export", "checkpoint=evil", "tracking=none", "export.formats=[safetensors]")
    assert answer.code == 0, answer.err
    assert "was written by okddip 0.0.1\\nResume" in answer.out
    assert not [line for line in answer.out.splitlines() if line.startswith("Resume with")]
    assert "\x1b" not in answer.out + answer.err


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_hostile_checkpoint_is_refused_in_every_way(okddip: Okddip, honest: State, way: str) -> None:
    open_in_all_ways(okddip, honest, way, HOSTILE)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused_with_a_sentence(honest: State, name: str) -> None:
    change, sentence = HOSTILE[name]
    change(honest)
    path = write(honest)
    with pytest.raises(ConfigError) as caught:
        Trust().check(checkpoint.load(path)["config"], path)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_run_that_is_made_longer_builds_nothing_that_it_hides(okddip: Okddip, honest: State) -> None:
    honest["config"]["methods"]["hidden"] = fire("trap.fire")  # no setting of the run
    write(honest)
    answer = okddip(*SMALL, "method=baseline", "trainer.resume=evil/last.pt", "trainer.epochs=2")
    refused(answer, "does not fit: optimizer")  # built from the command's own configuration


def test_an_archive_that_inflates_is_refused_unread(honest: State) -> None:
    path = write(honest)
    with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("last/data.pkl", bytes(2**25))
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile("small.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for part in whole.infolist():
            archive.writestr(part, whole.read(part), zipfile.ZIP_DEFLATED)
    for file in ("bomb.pt", "small.pt"):
        with pytest.raises(
            ConfigError, match=rf"{file}: is not a checkpoint of this program: its parts would take"
        ):
            checkpoint.load(Path(file))


def test_a_pickle_that_calls_is_not_recommended_to_be_trusted(honest: State) -> None:
    pickled(honest)
    with pytest.raises(ConfigError) as caught:
        checkpoint.load(write(honest))
    assert "GLOBAL posix.system" in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_an_export_of_a_strangers_runs_nothing(okddip: Okddip, honest: State) -> None:
    description = exported(okddip, str(write(honest)))
    resnet = "okddip.models.resnet.resnet"
    for model, sentence in (
        (fire("${oc.select:zz,trap.fire}"), "holds an interpolation"),
        (fire(resnet, depth="${oc.env:TOKEN}"), "holds an interpolation"),
        (fire(resnet, depth="???"), "the value is missing"),
        (fire("trap.fire"), "say so by trust=[trap]"),
        (fire("antigravity.fly"), NOT_CALLED),
        (fire(resnet, depth=8, extra=[fire("trap.fire")]), NOT_CALLED),
        (fire(resnet, _args_=[fire("trap.fire", _partial_=True)]), NOT_CALLED),
        (fire("okddip.methods.baseline.Baseline"), NOT_CALLED),
    ):
        Path("out", "model.json").write_text(json.dumps(description | {"model": model}))
        with pytest.raises(ConfigError) as caught:
            package.load("out")
        assert sentence in str(caught.value)
        assert str(Path("out", "model.json")) in str(caught.value)
        assert SECRET not in str(caught.value)


def exported(okddip: Okddip, of: str, *overrides: str) -> dict[str, Any]:
    answer = okddip(
        *("task=export", f"checkpoint={of}", "tracking=none"),
        *("export.formats=[safetensors]", "export.out=out", *overrides),
    )
    assert answer.code == 0, answer.err
    return json.loads(Path("out", "model.json").read_text())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("note: ${oc.env:TOKEN}", "note=${oc.env:TOKEN}: holds an interpolation"),
        ("note: ${", "cannot be read"),
        ("note: ???", "note=???: the value is missing"),
        ("note: !!python/object/apply:os.system [touch on_the_path/pwned]", "cannot be read"),
        ("a: &a [1,1]\nb: &b [*a,*a]\nnote: [*b,*b]", "holds YAML aliases"),
        ("note: [", "cannot be read"),
        ("[]", "is not the configuration of a run"),
        ("model: 7", "is not the configuration of a run"),
        ("options: {model: ../../../evil}", "names an option outside of the folders of options"),
    ],
)
def test_a_configuration_in_the_store_is_read_as_plain_data(honest: State, text: str, sentence: str) -> None:
    if text.startswith(("note", "a:", "options")):
        rest = {key: value for key, value in honest["config"].items() if key not in ("options", "note")}
        rest |= {} if text.startswith("options") else {"options": {}}
        text = f"{OmegaConf.to_yaml(OmegaConf.create(rest))}{text}\n"
    with pytest.raises(ConfigError) as caught:
        parse_configuration(text, "report.run=1: config.yaml")
    assert sentence in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.slow
def test_a_store_of_a_strangers_runs_nothing(okddip: Okddip, honest: State, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    MLflow(uri, "okddip").open()
    client = MlflowClient(uri)
    for name, (change, sentence) in {name: HOSTILE[name] for name in KNOWN}.items():
        state = copy.deepcopy(honest)
        change(state)
        experiment = client.get_experiment_by_name("okddip")
        run_id = client.create_run(experiment.experiment_id, run_name=name).info.run_id
        client.log_text(run_id, json.dumps(state["config"]), "config.yaml")
        client.log_artifact(run_id, str(write(state)))
        for options in (
            *[("task=evaluate", f"checkpoint=runs:/{run_id}")],
            *[("task=export", f"checkpoint=runs:/{run_id}", "export.formats=[safetensors]")],
            *[(*SMALL, "method=kd", f"method.teacher=runs:/{run_id}", "tracking=mlflow")],
        ):
            refused(okddip(*options, f"tracking.uri={uri}"), sentence)
        refused(okddip("task=report", f"report.run={run_id}", f"tracking.uri={uri}"), sentence)
        resume = (f"trainer.resume=runs:/{run_id}", f"tracking.uri={uri}")
        answer = okddip(*SMALL, "method=baseline", "tracking=mlflow", *resume)
        refused(answer, sentence if "holds an" in sentence else "made with other settings")


def test_what_is_no_configuration_may_say_what_it_likes(okddip: Okddip, honest: State) -> None:
    honest["classes"] = ["${oc.env:TOKEN}", "???", *honest["classes"][2:]]
    description = exported(okddip, str(write(honest)))
    assert description["classes"] == honest["classes"]
    assert package.load("out").classes == tuple(honest["classes"])


def test_class_names_of_a_teacher_are_none_of_the_benchmarks_configuration(
    configured: Callable[..., DictConfig],
) -> None:
    names = ["${oc.env:TOKEN}", "???", "\\${x}", "$5", '"']
    learned = {"classes": names, "mean": [0.5], "std": [0.5]}
    config = with_synthetic_images(configured(*SMALL), DataShape((8, 8), 1, len(names)), learned)
    assert make("dataset", config.dataset).classes == tuple(names)


def test_every_option_of_the_program_may_be_named_by_a_file() -> None:
    named = {target for found in package_targets().values() for target in found}
    assert {"okddip.models.vgg.vgg", "okddip.data.streaming.StreamingDataset", "torch.optim.SGD"} <= named
    for group in PARTS:
        for path in (CONFIG_HOME / "conf" / group).glob("*.yaml"):
            content = OmegaConf.to_container(OmegaConf.load(path))
            Trust().check({group: content}, path)
    config = {
        "optimizer": fire("torch.optim.RMSprop"),
        "model": fire("okddip.models.resnet.resnet", activation=fire("torch.nn.SiLU")),
    }
    Trust().check(plain(config, "", "file"), "file")
    assert len(list(targets(config))) == 3


def test_a_value_that_would_be_resolved_twice_is_refused_before_training(
    configured: Callable[..., DictConfig],
) -> None:
    config = configured(*SMALL, r"+dataset.note='\${oc.env:TOKEN}'")
    with pytest.raises(
        ConfigError, match=r"configuration: dataset.note=\$\{oc.env:TOKEN\}: holds an interpolation"
    ):
        check(config)


@pytest.mark.parametrize("trust", ["mine.py/", "os system", 7, [None], ["a..b"]])
def test_trust_is_a_list_of_modules(trust: Any) -> None:
    with pytest.raises(ConfigError, match="must be a list of modules, such as"):
        trust_in(trust)


OWN = """
import subprocess
from functools import partial
from subprocess import run
from torch import nn
from okddip.data import sources
from okddip.models.backbone import Backbone


class Net(Backbone):
    def __init__(self, num_classes, in_channels, activation):
        trunk = nn.Sequential(nn.Conv2d(in_channels, 4, 3, padding=1), activation)
        head = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(trunk, head, nn.Linear(8, num_classes), feature_dim=8, trunk_channels=4)

    @classmethod
    def plain(cls, num_classes, in_channels):
        return cls(num_classes, in_channels, nn.ReLU())


def net(num_classes, in_channels):
    return Net(num_classes, in_channels, nn.ReLU())


def source():
    return sources.digits(16)


def schedule(epochs):
    return lambda epoch: 1.0


small = partial(Net, activation=nn.ReLU())
"""
OPTIONS = {
    "model/own.yaml": "_target_: own.Net\nactivation:\n  _target_: torch.nn.SiLU\n",
    "dataset/own.yaml": (CONFIG_HOME / "conf" / "dataset" / "digits.yaml")
    .read_text()
    .replace("okddip.data.sources.digits", "own.source")
    .replace("  image_size: ${dataset.image_size}\n", ""),
    "scheduler/own.yaml": "_target_: own.schedule\n",
}
OWN_RUN = (
    *("model=own", "dataset=own", "scheduler=own", "method=baseline", "tracking=none"),
    *("trainer.epochs=1", "trainer.limit_batches=1", "hydra.run.dir=run"),
)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own module and option files."""
    monkeypatch.delitem(sys.modules, "own", raising=False)
    (tmp_path / "on_the_path" / "own.py").write_text(OWN)
    for name, text in OPTIONS.items():
        (tmp_path / "options" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "options" / name).write_text(text)


@pytest.mark.usefixtures("own")
def test_parts_of_ones_own_train_and_are_used_where_they_are_named(okddip: Okddip) -> None:
    assert okddip("--config-dir", "options", *OWN_RUN).code == 0
    evaluate = ("task=evaluate", "checkpoint=run", "tracking=none", "trainer.limit_batches=1")
    sys.modules.pop("own")
    answer = okddip(*evaluate)
    refused(answer, NOT_CALLED)
    assert "last.pt: model._target_=own.Net" in answer.err
    assert "If it is your own code, say so by trust=[own]." in answer.err
    assert "own" not in sys.modules
    for named in (["trust=[own]"], ["--config-dir", "options"]):
        answer = okddip(*evaluate, *named)
        assert answer.code == 0, answer.err
    exported(okddip, "run", "trust=[own]")
    with pytest.raises(ConfigError, match=r"say so by trust=\[own\]"):
        package.load("out")
    assert len(package.load("out", trust=["own"]).classes) == 10


@pytest.mark.slow
@pytest.mark.usefixtures("own")
def test_parts_of_ones_own_go_on_and_teach(okddip: Okddip) -> None:
    folder = ("--config-dir", "options")
    assert okddip(*folder, *OWN_RUN).code == 0
    answer = okddip(*folder, *OWN_RUN, "trainer.resume=run", "trainer.epochs=2")  # the command names them
    assert answer.code == 0, answer.err
    assert checkpoint.load(Path("run/last.pt"))["epoch"] == 1
    kd = (*SMALL, "method=kd", "method.teacher=run")
    refused(okddip(*kd), f"last.pt: model._target_=own.Net: {NOT_CALLED}")
    answer = okddip(*kd, "trust=[own]")
    assert answer.code == 0, answer.err


@pytest.mark.usefixtures("own")
def test_trust_in_a_module_ends_with_what_is_defined_in_it() -> None:
    trust = trust_in(["own"])
    for target in ("own.Net", "own.net", "own.Net.plain", "own.small"):
        trust.check({"model": fire(target)}, "file")
    for target in (
        *("own.run", "own.subprocess.run", "own.Net.load_state_dict", "own.Backbone", "own.sources.digits"),
        *("own.Net.__class__", "own.Net.__init__.__globals__", "own.nothing", "owner.Net", "own"),
    ):
        with pytest.raises(ConfigError, match=NOT_CALLED):
            trust.check({"model": fire(target)}, "file")
    with pytest.raises(ConfigError, match="trust=owner: cannot be imported"):
        trust_in(["owner"]).check({"model": fire("owner.Net")}, "file")


def test_another_version_of_the_program_is_named(okddip: Okddip, honest: State) -> None:
    sentence = f"was written by okddip 0.0.7, and this is okddip {package.__version__}."
    honest["version"] = "0.0.7"
    write(honest)
    for command in (
        ("task=export", "checkpoint=evil", "tracking=none", "export.formats=[safetensors]"),
        (*SMALL, "method=kd", "method.teacher=evil"),
        (*SMALL, "method=baseline", "trainer.resume=evil/last.pt"),
    ):
        answer = okddip(*command)
        assert sentence in answer.out + answer.err, command


def test_where_decoded_images_are_kept_is_for_this_machine_to_say(
    okddip: Okddip, honest: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest["config"]["dataset"]["cache_dir"] = "a place of the stranger's"
    write(honest)
    seen = []
    from okddip.tasks.evaluate import task

    monkeypatch.setattr(task, "check_images", lambda settings, *_: seen.append(settings.dataset.cache_dir))
    okddip("task=evaluate", "checkpoint=evil", "tracking=none", "trainer.limit_batches=1")
    assert seen == [os.environ["OKDDIP_CACHE"]]


def test_one_of_several_networks_is_trusted_as_a_single_one_is() -> None:
    ours = {"_target_": "okddip.models.resnet.resnet", "depth": 8}
    for networks, allowed in (
        ([ours, ours], True),
        ([ours, {"_target_": "os.system"}], False),
        ([ours, {"_target_": "torch.nn.Linear"}], False),  # within a model, but no model
        ([ours, {**ours, "depth": {"_target_": "builtins.exec"}}], False),
        ([[{"_target_": "okddip.models.resnet.resnet"}]], False),
    ):
        config = {"model": {"peers": ["a", "b"], "networks": networks}}
        with nullcontext() if allowed else pytest.raises(ConfigError, match=NOT_CALLED):
            Trust().check(config, "file")
