import copy
import json
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from conftest import Answer
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from okddip.assembly import CONFIG_HOME
from okddip.main import build
from okddip.run.parts import Parts
from okddip.tasks.benchmark.measure import Bench, Operators, Spread, count
from okddip.tasks.benchmark.plain_loop import PilLoader, Reference
from okddip.tasks.benchmark.task import Shape, shape_of, with_synthetic_images
from okddip.training.epoch import evaluate_on

Okddip = Callable[..., Answer]
BuildParts = Callable[..., Parts]

METHODS = sorted(path.stem for path in (CONFIG_HOME / "conf" / "method").glob("*.yaml"))
CASES = [  # kd needs a teacher, see below; the gate of ONE needs a shared trunk
    (method, structure)
    for method in METHODS
    for structure in ("branch", "network")
    if method != "kd" and (method, structure) != ("one", "network")
]
SMALL = (
    *("task=benchmark", "model=resnet8", "trainer.batch_size=8", "trainer.eval_batch_size=16"),
    *("benchmark.repeats=3", "benchmark.warmup=1", "benchmark.seconds=0", "benchmark.image_size=8"),
)


@pytest.fixture
def parts(configured: Callable[..., DictConfig]) -> BuildParts:
    """Build what a command line describes, on small synthetic images."""

    def build_parts(*overrides: str) -> Parts:
        config = configured("tracking=none", "trainer.device=cpu", *overrides)
        return build(with_synthetic_images(config, Shape((8, 8), 3, 10), {}))

    return build_parts


@pytest.fixture
def teacher(okddip: Okddip, tmp_path: Path) -> Path:
    """A checkpoint of a network for grey images of 16x16."""
    small = ("dataset=digits", "model=resnet8", "trainer.epochs=1", "trainer.limit_batches=1")
    assert okddip("method=baseline", "tracking=none", *small, "hydra.run.dir=teacher").code == 0
    return tmp_path / "teacher" / "last.pt"


def test_the_reference_dispatches_as_much_as_the_authors_loop(parts: BuildParts) -> None:
    """Measured of their train_GL.py: 2,428 operators and 13 reads a step, 141 reads an evaluation batch."""
    built = parts("trainer.batch_size=8", "trainer.eval_batch_size=128")
    assert (built.method.peers, built.method.structure) == (4, "branch")
    bench = Bench(built)
    reference = Reference(built.group, built.method)
    modules = [reference.group, reference.method]
    batch, ramp = bench.next_batch(), torch.ones(())
    step = count(lambda: reference.train_step(*batch, ramp), modules, training=True)
    assert step["operators"] == pytest.approx(2428, rel=0.05)
    assert step["host_reads"] == 13
    evaluation = count(lambda: reference.evaluate(*bench.eval_batch, ramp), modules, training=False)
    assert evaluation["host_reads"] == 141


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=okddip"],
        ["method=okddip", "method.structure=network"],
        ["method=okddip", "method.leader=false"],
        ["method=okddip", "method.attention=false"],
        ["method=dml"],
        ["method=one"],
        ["method=baseline"],
        ["method=cl_ilr"],
        ["method.loss=ce"],
        ["method.include_self=false"],
        ["method.aggregate=probabilities"],
        ["method.detach_targets=true"],
    ],
)
def test_the_reference_trains_the_same_networks_to_the_same_weights(
    parts: BuildParts, overrides: list[str]
) -> None:
    built = parts(*overrides, "model=resnet8", "trainer.batch_size=16")
    bench = Bench(built)
    reference = Reference(built.group, built.method)
    before = copy.deepcopy(built.group.state_dict())
    batch = bench.next_batch()
    built.group.train()
    reference.group.train()
    bench.update(*batch)
    numbers = reference.train_step(*batch, torch.ones(()))
    assert numbers["loss0"] == pytest.approx(bench.sums["loss"].item() / 16, rel=1e-4)
    theirs = reference.group.state_dict()
    for name, tensor in built.group.state_dict().items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(before[name], tensor) for name, tensor in theirs.items())


def test_the_reference_evaluates_to_the_same_numbers(parts: BuildParts) -> None:
    built = parts("model=resnet8", "trainer.eval_batch_size=32")
    bench = Bench(built)
    reference = Reference(built.group, built.method)
    for module in (built.group, reference.group):
        module.eval()
    bench.eval_loader.images = bench.eval_loader.images[:32]
    ours = evaluate_on(built.group, built.method, bench.eval_forward, [bench.eval_batch], bench.ramp)
    theirs = reference.evaluate(*bench.eval_batch, bench.ramp)
    assert theirs["loss0"] == pytest.approx(ours["loss"].item() / 32, rel=1e-4)
    assert theirs["diversity"] == pytest.approx(ours["diversity"].item() / 32, rel=1e-3)
    hits = [theirs[f"{i}/top{k}"] for k in (1, 5) for i in range(5)]
    assert hits == pytest.approx([100 * x / 32 for x in (*ours["top1"].tolist(), *ours["top5"].tolist())])


def test_transforms_one_by_one_see_each_image_once_an_epoch(parts: BuildParts) -> None:
    built = parts("dataset.pad=0", "dataset.flip=false", "model=resnet8", "trainer.batch_size=16")
    dataset = built.dataset
    dataset.splits["train"] = type(dataset.splits["train"])(*(x[:40] for x in dataset.splits["train"]))
    loader = PilLoader(dataset, 16)
    batches = [loader.next_batch() for _ in range(3)]
    assert [len(labels) for _, labels in batches] == [16, 16, 8]
    [(images, labels)] = dataset.train_loader(40, torch.device("cpu"), 0).batches(0)

    def ordered(images: Tensor, labels: Tensor) -> list[list[float]]:
        return sorted(
            [*image.flatten().tolist(), float(label)] for image, label in zip(images, labels, strict=True)
        )

    theirs = ordered(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ordered(images, labels)))


def test_a_training_step_takes_at_most_a_thousand_operators(parts: BuildParts) -> None:
    built = parts("trainer.batch_size=8", "trainer.precision=fp32")
    step = count(Bench(built).train_step, [built.group, built.method], training=True)
    assert step["operators"] - step["detaches"] <= 1000


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("option", "structure"), CASES)
def test_no_step_reads_back_from_the_device(
    parts: BuildParts, option: str, structure: str, precision: str
) -> None:
    overrides = [f"method={option}", f"method.structure={structure}", f"trainer.precision={precision}"]
    if option == "cl_ilr":
        overrides.append(f"method.rescale={str(structure == 'branch').lower()}")
    built = parts(*overrides, "model=resnet8", "trainer.batch_size=8", "trainer.eval_batch_size=8")
    bench = Bench(built)
    modules = [built.group, built.method]
    for training, run in (
        (True, bench.train_step),
        (False, lambda: bench.evaluate_batches(bench.eval_loader.batches())),
    ):
        counted = count(run, modules, training=training)
        assert counted["operators"] > 50
        assert counted["host_reads"] == 0


@pytest.mark.parametrize("overrides", [[], ["trainer.gradient_clip=1"], ["optimizer=adamw"]])
def test_no_scaled_step_of_a_fused_optimizer_reads_back(parts: BuildParts, overrides: list[str]) -> None:
    built = parts("trainer.precision=fp16", "model=resnet8", "trainer.batch_size=8", *overrides)
    assert count(Bench(built).train_step, [built.group, built.method], training=True)["host_reads"] == 0


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_networks_work_in_the_memory_format_that_is_asked_for(
    configured: Callable[..., DictConfig], channels: int, channels_last: bool
) -> None:
    config = configured("tracking=none", "trainer.device=cpu", "model=resnet8", "trainer.batch_size=8")
    config.trainer.channels_last = channels_last
    built = build(with_synthetic_images(config, Shape((8, 8), channels, 10), {}))
    bench = Bench(built)
    formats = set()
    for module in built.group.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: formats.add(output.stride(1) == 1))
    bench.train_step()
    bench.evaluate()
    assert formats == {channels_last}


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.any()), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.masked_select(x > 0), 1),
        (lambda x: x.to("meta"), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.numpy(), 1),
        (lambda x: np.asarray(x), 1),
        (lambda x: x[torch.tensor([0, 2])], 0),
        (lambda x: torch.where(x > 0, x, 0), 0),
    ],
)
def test_host_reads_are_counted(read: Callable[[Tensor], object], expected: int) -> None:
    with Operators() as operators:
        read(torch.tensor([1.0, -1.0, 2.0]))
    assert operators.host_reads == expected


@pytest.mark.slow
def test_networks_have_a_cost_curve_where_branches_rescale(okddip: Okddip, tmp_path: Path) -> None:
    answer = okddip(*SMALL, "method=cl_ilr", "tracking=none", "benchmark.peers=[2]", "benchmark.out=5")
    assert answer.code == 0, answer.err
    points = json.loads((tmp_path / "5").read_text())["cost"]
    assert [point["structure"] for point in points] == ["baseline", "branch", "network"]


def test_the_spread_is_the_median_with_its_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_it_reports_to_terminal_file_and_mlflow_and_needs_no_data(okddip: Okddip, tmp_path: Path) -> None:
    answer = okddip(
        *(*SMALL, "dataset=cifar10", "dataset.root=nowhere"),
        *("benchmark.out=numbers.json", "benchmark.peers=[2,3]", "trainer.precision=bf16"),
    )
    assert answer.code == 0, answer.err
    for line in ("training step", "evaluation batch, host reads", "left out: branch, 2 peers", "of a matrix"):
        assert line in answer.out
    assert not (tmp_path / "nowhere").exists()

    report = json.loads((tmp_path / "numbers.json").read_text())
    assert report["precision"] == "bf16"
    assert report["classes"] == 10
    assert report["train_step"]["reference"]["host_reads"] == 13
    assert report["train_step"]["okddip"]["host_reads"] == 0
    for part in ("input", "forward", "train", "evaluate"):
        assert report["images_per_second"]["okddip"][part]["low"] > 0
        assert report["ratio"][part]["median"] > 0
    assert 0 < report["flops"]["share_of_peak"] < 1
    cost = {(point["structure"], point["peers"]): point for point in report["cost"]}
    assert list(cost) == [("baseline", 1), ("branch", 3), ("network", 3)]
    for less, more in (("baseline", 1), ("branch", 3)), (("branch", 3), ("network", 3)):
        assert cost[less]["flops"] < cost[more]["flops"]
        for kind in ("model_bytes", "step_bytes"):
            assert cost[less]["memory"][kind] < cost[more]["memory"][kind]

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("okddip").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["ratio/train/median"] == report["ratio"]["train"]["median"]
    [point] = client.get_metric_history(run.info.run_id, "cost/network/step_seconds/median")
    assert point.step == 3
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == [
        "command.txt",
        "config.yaml",
        "numbers.json",
    ]


def test_a_teacher_settles_the_shape_of_the_images(okddip: Okddip, tmp_path: Path, teacher: Path) -> None:
    small = tuple(part for part in SMALL if "image_size" not in part)
    answer = okddip(
        *small, "method=kd", f"method.teacher={teacher}", "tracking=none", "benchmark.out=numbers.json"
    )
    assert answer.code == 0, answer.err
    report = json.loads((tmp_path / "numbers.json").read_text())
    assert (report["image_size"], report["channels"], report["classes"]) == ([16, 16], 1, 10)
    for counted in (report["train_step"], report["evaluation_batch"]):
        assert counted["okddip"]["host_reads"] == 0


def test_the_reference_has_the_teacher_too(configured: Callable[..., DictConfig], teacher: Path) -> None:
    config = configured("task=benchmark", "method=kd", f"method.teacher={teacher}", "tracking=none")
    shape, learned = shape_of(config)
    built = build(with_synthetic_images(config, shape, learned))
    bench, reference = Bench(built), Reference(built.group, built.method)
    built.group.eval()
    reference.group.eval()
    flops = []
    for forward in (bench.forward, lambda: reference.forward(bench.eval_batch[0])):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]
    assert all(weight.is_contiguous() for weight in reference.group.teacher[0].parameters())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["benchmark.repeats=0"], "benchmark.repeats=0: must be a whole number at least 1"),
        (["benchmark.warmup=0"], "benchmark.warmup=0: must be a whole number at least 1"),
        (["benchmark.seconds=long"], "benchmark.seconds=long: must be a number at least 0"),
        (["benchmark.peers=3"], "benchmark.peers=3: must be a list, such as [2,3,4,6,8]"),
        (["benchmark.peers=[0]"], "benchmark.peers=0: must be a whole number at least 1"),
        (["benchmark.image_size=[8,8,8]"], "must be one number, or [height, width]"),
        (["benchmark.image_size=-8"], "benchmark.image_size=-8: must be a whole number at least 1"),
        (["benchmark.channels=5"], "benchmark.channels=5: must be one of 1, 3"),
        (["benchmark.classes=0"], "benchmark.classes=0: must be a whole number at least 1"),
        (["benchmark.out=nowhere/numbers.json"], "benchmark.out=nowhere/numbers.json: cannot be written"),
        (["trainer.batch_size=0"], "trainer.batch_size=0: must be a whole number at least 1"),
        (["dataset.image_size=large"], "dataset.image_size=large: must be a whole number at least 1"),
        (["dataset=image_folder", "dataset.root=x"], "benchmark.channels is not given"),
        (["method=kd", "method.teacher=auto"], "method.teacher=auto: task=benchmark trains no teacher"),
        (["method.peers=2"], "method.peers=2: OKDDip takes at least 3"),
    ],
)
def test_what_cannot_be_measured_is_refused(okddip: Okddip, overrides: list[str], message: str) -> None:
    answer = okddip(*SMALL, "tracking=none", *overrides)
    assert answer.code == 1
    assert message in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["branch", "network"])
def test_a_run_compiles_one_training_step_and_one_evaluation(okddip: Okddip, structure: str) -> None:
    """Neither the ramp nor the short last batch of an epoch is compiled anew."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    answer = okddip(
        *("experiment=quickstart", "trainer.epochs=4", "trainer.compile=true", "method.ramp_epochs=3"),
        *(f"method.structure={structure}", "method.peers=3", "trainer.eval_batch_size=100", "tracking=none"),
    )
    assert answer.code == 0, answer.err
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
