"""Task benchmark: what it reports, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import torch
import torch._inductor.config
from conftest import Answer
from omegaconf import DictConfig
from torch.utils.flop_counter import FlopCounterMode

from okddip.main import build
from okddip.tasks.benchmark import timing
from okddip.tasks.benchmark.plain_loop import PlainLoop
from okddip.tasks.benchmark.steps import TrainerSteps
from okddip.tasks.benchmark.synthetic import find_shape, with_synthetic_images
from okddip.training.precision import is_native

Okddip = Callable[..., Answer]

SMALL = (
    *("task=benchmark", "model=resnet8", "trainer.batch_size=8", "trainer.eval_batch_size=16"),
    *("benchmark.repeats=3", "benchmark.warmup=1", "benchmark.seconds=0", "benchmark.image_size=8"),
)


@pytest.fixture
def teacher(okddip: Okddip, tmp_path: Path) -> Path:
    """A checkpoint of a network for grey images of 16x16."""
    small = ("dataset=digits", "model=resnet8", "trainer.epochs=1", "trainer.limit_batches=1")
    assert okddip("method=baseline", "tracking=none", *small, "hydra.run.dir=teacher").code == 0
    return tmp_path / "teacher" / "last.pt"


@pytest.mark.slow
def test_networks_have_a_cost_curve_where_branches_rescale(okddip: Okddip, tmp_path: Path) -> None:
    answer = okddip(*SMALL, "method=cl_ilr", "tracking=none", "benchmark.peers=[2]", "benchmark.out=5")
    assert answer.code == 0, answer.err
    points = json.loads((tmp_path / "5").read_text())["cost"]
    assert [point["structure"] for point in points] == ["baseline", "branch", "network"]


def test_it_reports_to_terminal_file_and_mlflow_and_needs_no_data(
    okddip: Okddip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(timing.MATRIX_SIZE, "cpu", 512)
    with torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",)):  # compiling takes half a minute
        answer = okddip(
            *(*SMALL, "dataset=cifar10", "dataset.root=nowhere", "benchmark.out=numbers.json"),
            *("benchmark.peers=[2,3]", "benchmark.settings=all", "trainer.precision=bf16"),
        )
    assert answer.code == 0, answer.err
    fastest = "bf16" if is_native("bf16", torch.device("cpu")) else "fp32"
    for line in (
        *("training step", "evaluation batch, host reads", "left out: branch, 2 peers", "of a matrix"),
        *("operators read and write", "first: step, with compiling"),
        f"left out: {fastest} compiled. trainer.comp",
    ):
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
    assert report["step"]["seconds"]["median"] > 0
    assert 0 < report["bytes"]["share_of_copy"] < 1
    *measured, left_out = report["settings"]
    assert measured[0]["setting"] == "fp32"
    assert measured[0]["first_step_seconds"] > 0
    assert measured[0]["bytes"]["step"] > measured[-1]["memory"].get("peak_bytes", 0)
    assert left_out["setting"].endswith("compiled")
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
    assert run.data.metrics["settings/fp32/flops/step"] == report["flops"]["step"]
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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["benchmark.repeats=0"], "benchmark.repeats=0: must be a whole number at least 1"),
        (["benchmark.warmup=0"], "benchmark.warmup=0: must be a whole number at least 1"),
        (["benchmark.seconds=long"], "benchmark.seconds=long: must be a number at least 0"),
        (["benchmark.peers=3"], "benchmark.peers=3: must be a list, such as [2,3,4,6,8]"),
        (["benchmark.settings=some"], "benchmark.settings=some: must be one of None, all"),
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
def test_moving_averages_are_compiled_once_too(okddip: Okddip) -> None:
    """Neither the ramp nor the short last batch of an epoch is compiled anew."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    answer = okddip(
        *("experiment=quickstart", "method=pcl", "trainer.epochs=2", "trainer.compile=true"),
        *("method.ramp_epochs=3", "method.peers=2", "trainer.eval_batch_size=100", "tracking=none"),
    )
    assert answer.code == 0, answer.err
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_the_plain_loop_has_the_teacher_too(configured: Callable[..., DictConfig], teacher: Path) -> None:
    config = configured("task=benchmark", "method=kd", f"method.teacher={teacher}", "tracking=none")
    shape, learned = find_shape(config)
    built = build(with_synthetic_images(config, shape, learned))
    steps, plain_loop = TrainerSteps(built), PlainLoop(built.group, built.method)
    built.group.eval()
    plain_loop.group.eval()
    flops = []
    for forward in (steps.forward, lambda: plain_loop.forward(steps.eval_batch[0])):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]
    assert all(weight.is_contiguous() for weight in plain_loop.group.teacher[0].parameters())
