"""The program from its command line."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import torch
from conftest import Answer, no_room
from PIL import Image

from okddip.training import checkpoint

Okddip = Callable[..., Answer]
REPOSITORY = Path(__file__).parents[1]
SMALL = (
    *("experiment=quickstart", "trainer.epochs=2", "trainer.limit_batches=3"),
    *("trainer.batch_size=32", "trainer.eval_batch_size=64"),
)


def test_two_epochs_leave_checkpoints_metrics_and_a_finished_mlflow_run(
    okddip: Okddip, tmp_path: Path
) -> None:
    answer = okddip(*SMALL, "method.peers=3", "hydra.run.dir=run")
    assert answer.code == 0, answer.err
    for line in ("3 peers (branch)", "resnet8, 77,754 parameters", "1,438 train, 359 test", "leader *"):
        assert line in answer.out

    last = checkpoint.load(tmp_path / "run" / "last.pt")
    assert last["epoch"] == 1
    assert last["config"]["method"]["peers"] == 3
    assert checkpoint.load(tmp_path / "run" / "previous.pt")["epoch"] == 0

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("okddip").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["method.peers"] == "3"
    assert run.data.params["dataset"] == "digits"
    assert run.data.tags["model"] == "resnet8"
    assert (run.data.tags["predictor"], run.data.tags["parameters.kept"]) == ("leader", "77754")
    for name in (
        *("train/loss", "train/hard_loss", "train/first_level_loss", "train/second_level_loss"),
        *("train/lr", "train/ramp", "train/images_per_second", "train/leader/top1", "train/peer1/top5"),
        *("test/loss", "test/diversity", "test/top1", "test/top5", "test/leader/top1", "test/peer0/top1"),
        *("test/peer1/top5", "test/mean/top1", "test/ensemble/top1"),
    ):
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, name)] == [1, 2], name
    assert run.data.metrics["test/top1"] == run.data.metrics["test/leader/top1"]
    assert run.data.metrics["final/top1"] == run.data.metrics["test/top1"]
    assert run.data.metrics["best/top1"] >= run.data.metrics["final/top1"]
    used = {tag.value: each.dataset for each in run.inputs.dataset_inputs for tag in each.tags}
    assert {context: json.loads(dataset.profile)["num_rows"] for context, dataset in used.items()} == {
        "train": 1438,
        "test": 359,
    }
    assert run.data.tags["version"]
    assert "okddip, 3 peers (branch)" in run.data.tags["mlflow.note.content"]
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "last.pt", "best.pt", "main.log", "attention.csv", "attention.png"} <= artifacts
    assert not [name for name in run.data.metrics if "attention" in name or "epoch" in name]
    assert run.data.tags["best.epoch"] == f"{last['history']['best']['epoch'] + 1:.0f}"
    *_, start, page = answer.out.splitlines()
    assert start == "MLflow     mlflow ui --backend-store-uri sqlite:///mlflow.db"
    assert page.split()[0].startswith(f"http://127.0.0.1:5000/#/experiments/1/runs/{run.info.run_id}")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("method", ["baseline", "okddip"])
def test_the_same_seed_gives_the_same_weights_bit_for_bit(
    okddip: Okddip, tmp_path: Path, method: str
) -> None:
    weights = []
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        command = (*SMALL, f"method={method}", "tracking=none", f"seed={seed}", f"hydra.run.dir={name}")
        if method == "baseline":
            command = tuple(part for part in command if part != "experiment=quickstart")
            command += ("dataset=digits", "model=resnet8")
        assert okddip(*command).code == 0
        weights.append(checkpoint.load(tmp_path / name / "last.pt")["group"])
    first, second, other = weights
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_a_validation_split_is_logged_and_chooses_the_best(okddip: Okddip, tmp_path: Path) -> None:
    answer = okddip(*SMALL, "tracking=none", "dataset.validation=0.1", "hydra.run.dir=run")
    assert answer.code == 0, answer.err
    history = checkpoint.load(tmp_path / "run" / "best.pt")["history"]
    assert "val/top1" in history["best"]
    assert history["best"]["val/top1"] >= history["last"]["val/top1"]


def test_a_failing_run_is_marked_failed(okddip: Okddip, tmp_path: Path) -> None:
    answer = okddip(*SMALL, "optimizer.lr=1e30")
    assert answer.code == 1
    assert "Epoch 1: loss" in answer.err
    assert "is not finite" in answer.err
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("okddip").experiment_id])
    assert run.info.status == "FAILED"


WITHOUT_OPTIONS = [f"~optimizer.{name}" for name in ("momentum", "nesterov", "weight_decay", "fused")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.peerz=3"], "Did you mean method.peers=3?"),
        (["method.peers=1"], "method.peers=1: "),
        (["method.peers=2"], "method.peers=2: OKDDip takes at least 3"),
        (["method.peers=four"], "method.peers=four: must be a whole number"),
        (["method.temperature=0"], "method.temperature=0: must be a number greater than 0"),
        (["method.temperature=-3"], "method.temperature=-3"),
        (["method.structure=tree"], "method.structure=tree: must be one of branch, network"),
        (["trainer.epochs=0"], "trainer.epochs=0: must be a whole number at least 1"),
        (["trainer.batch_size=-1"], "trainer.batch_size=-1"),
        (["optimizer.lr=0"], "optimizer.lr=0: must be a number greater than 0"),
        (["optimizer.momentum=much"], "optimizer: "),
        (["optimizer=adamw", "optimizer.betas=[]"], "optimizer: list index out of range, with"),
        (
            ["method=ffl", *WITHOUT_OPTIONS, "optimizer._target_=torch.optim.Rprop"],
            "method.weight_decay=1e-05: Rprop has none; give null",
        ),
        ([*WITHOUT_OPTIONS, "optimizer._target_=torch.optim.LBFGS"], "'closure'"),
        ([*WITHOUT_OPTIONS, "optimizer._target_=torch.optim.SparseAdam"], "optimizer: SparseAdam"),
        (["method=baseline", "method.peers=2"], "method.peers=2: must be 1."),
        (["scheduler.milestones=[225,150]"], "scheduler.milestones=[225, 150]: must ascend"),
        (["seed=-1"], "seed=-1"),
        (["name=null"], "name=None: must be text"),
        (["seed=99999999999999999999"], "seed=99999999999999999999: must be a whole number"),
        (["experiment=null"], "experiment=null: must be an option of conf/experiment"),
        (["method=[0.5]"], "method=[0.5]: must be an option of conf/method"),
        (["~optimizer.lr"], "optimizer.lr: is not in the configuration"),
        (["~trainer.epochs"], "trainer.epochs: is not in the configuration"),
        (["~seed"], "seed"),
        (["+method.foo=1"], "method.foo: is no option of okddip."),
        (["optimizer._partial_=1"], "_partial_"),
        (["~method._target_"], "method._target_: names what is to be made, and is not there"),
        (["~task"], "task._target_=None: is no function"),
        (["task._target_=os.nope"], "task._target_=os.nope: is no function"),
        (["trainer.epochs=10000000000"], "trainer.epochs=10000000000: must be a whole number"),
        (["method.peers=100000"], "method.peers=100000: must be a whole number at least 1 and at most 1000"),
        (["method.peers=1000", "model=wrn20_8"], "need"),
        (
            ["dataset=digits", "dataset.pad=100000000"],
            "dataset.pad=100000000: the images of digits are 16x16",
        ),
        (["name=${nobody}"], "nobody"),
        (["trainer.precision=fp8"], "trainer.precision=fp8: must be one of auto, fp32, bf16, fp16"),
        (["method=one", "method.structure=network"], "the gate of ONE looks at the output of a shared trunk"),
        (["method=cl_ilr", "method.structure=network"], "networks share none"),
        (["method=kd"], "method.teacher is not set"),
        (["dataset=image_folder", "dataset.root=nowhere"], "dataset.root=nowhere"),
        (["tracking=mlflow", "tracking.uri=sqlite:////nowhere/mlflow.db"], "tracking.uri=sqlite:////nowhere"),
    ],
)
def test_bad_input_is_refused_by_name_without_a_stack_of_frames(
    okddip: Okddip, overrides: list[str], message: str
) -> None:
    answer = okddip("tracking=none", *overrides)
    assert answer.code == 1
    assert message in answer.err
    assert "Traceback" not in answer.err
    assert "HYDRA_FULL_ERROR" not in answer.err
    assert not Path("outputs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(okddip: Okddip) -> None:
    answer = okddip("trainer.device=cuda")
    assert answer.code == 1
    assert "trainer.device=cuda: PyTorch sees 0 CUDA devices" in answer.err


def test_an_output_folder_that_cannot_be_written_is_refused(okddip: Okddip, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for overrides in (["hydra.run.dir=file/run"], ["-m", "hydra.sweep.dir=file/sweep", "seed=0,1"]):
        answer = okddip(*overrides)
        assert answer.code == 1
        assert "the output folder cannot be written" in answer.err
        assert "Traceback" not in answer.err


def test_an_output_folder_without_room_is_refused(okddip: Okddip) -> None:
    with no_room(10_000):
        answer = okddip(*SMALL, "hydra.run.dir=run")
    assert answer.code == 1
    assert "hydra.run.dir=run: the output folder cannot be written (File too large)" in answer.err
    assert "Traceback" not in answer.err


def test_no_distillation_is_a_valid_setting(okddip: Okddip) -> None:
    answer = okddip(*SMALL, "tracking=none", "method.alpha=0", "method.ramp_epochs=0")
    assert answer.code == 0, answer.err


def test_milestones_and_ramps_past_the_end_are_warned_about(okddip: Okddip) -> None:
    answer = okddip(*SMALL, "tracking=none", "scheduler.milestones=[1,150]", "method.ramp_epochs=80")
    assert answer.code == 0, answer.err
    assert "[150] lie past the last of 2 epochs" in answer.out
    assert "The ramp of 80 epochs does not end" in answer.out


def test_a_last_batch_of_one_image_is_left_out_of_training(okddip: Okddip, tmp_path: Path) -> None:
    overrides = ("dataset=digits", "model=resnet8", "method=one", "trainer.epochs=1", "tracking=none")
    answer = okddip(
        *overrides, "dataset.train_size=257", "trainer.batch_size=64", "trainer.eval_batch_size=358"
    )
    assert answer.code == 0, answer.err
    assert "359 test images" in answer.out  # and the test set's last image is evaluated alone


def test_a_training_set_that_fills_no_batch_is_refused_where_short_ones_are_left_out(okddip: Okddip) -> None:
    few = ("dataset=digits", "model=resnet8", "tracking=none", "dataset.train_size=100")
    answer = okddip(*few, "trainer.drop_last=true")
    assert answer.code == 1
    assert "trainer.drop_last=true: 100 training images fill no batch of trainer.batch_size=128" in answer.err


def test_a_training_set_of_one_image_is_refused(okddip: Okddip, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "images" / split / "cat").mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / split / "cat" / "0.png")
    overrides = ("model=resnet8", "tracking=none", "dataset.mean=[0,0,0]", "dataset.std=[1,1,1]")
    answer = okddip("dataset=image_folder", "dataset.root=images", *overrides)
    assert answer.code == 1
    assert "needs at least two images" in answer.err
    assert "Traceback" not in answer.err


def test_a_teacher_for_larger_images_is_refused(okddip: Okddip) -> None:
    small = ("dataset=digits", "trainer.epochs=1", "trainer.limit_batches=1", "tracking=none")
    teacher = ("method=baseline", "model=vgg16", "dataset.image_size=32", "trainer.batch_size=4")
    assert okddip(*small, *teacher, "trainer.eval_batch_size=4", "hydra.run.dir=teacher").code == 0
    answer = okddip(*small, "method=kd", "model=resnet8", "method.teacher=teacher")
    assert answer.code == 1
    assert "takes images of at least 32 pixels a side" in answer.err


def test_a_teacher_is_asked_about_images_as_it_knows_them(okddip: Okddip) -> None:
    small = (
        "dataset=digits",
        "trainer.epochs=1",
        "trainer.limit_batches=1",
        "tracking=none",
        "model=resnet8",
    )
    assert okddip(*small, "method=baseline", "hydra.run.dir=teacher").code == 0
    student = (*small, "method=kd", "method.teacher=teacher")
    answer = okddip(*student, "dataset.mean=[0.1]", "dataset.std=[0.4]")
    assert answer.code == 1
    assert "method.teacher=teacher: learned from images normalised by mean [0.30" in answer.err
    assert "dataset=digits normalises by [0.1] and [0.4]" in answer.err
    # a part of the training set has other statistics, by little
    answer = okddip(*student, "dataset.train_size=200", "dataset.image_size=12")
    assert answer.code == 0, answer.err
    assert (
        "method.teacher=teacher: was trained on images of 16x16, and those of dataset=digits have 12x12"
        in (answer.out)
    )


def test_multirun_sweeps_seeds(okddip: Okddip, tmp_path: Path) -> None:
    answer = okddip("-m", *SMALL, "method=baseline", "tracking=none", "seed=0,1", "hydra.sweep.dir=sweep")
    assert answer.code == 0, answer.err
    seeds = [checkpoint.load(path)["config"]["seed"] for path in sorted(tmp_path.glob("sweep/*/last.pt"))]
    assert seeds == [0, 1]


def test_nothing_heavy_is_imported_before_the_configuration_is_composed() -> None:
    probe = (
        "import sys; sys.argv = ['okddip', '--cfg', 'job'];"
        "from okddip.main import cli; cli();"
        "heavy = {'torch', 'mlflow', 'torchvision', 'sklearn', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    finished = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=REPOSITORY)
    assert finished.returncode == 0, finished.stderr


def blocks_of_the_readme(heading: str) -> list[str]:
    """The code blocks of a section, in their order."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"```\w+\n(.*?)```", section, flags=re.DOTALL)


@pytest.mark.slow
def test_a_users_own_method_runs_from_an_installed_wheel(tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"),
            *("--target", str(installed), str(REPOSITORY)),
        ],
        check=True,
        capture_output=True,
    )
    method, options, _ = blocks_of_the_readme("Your own method")
    assert len((method + options).splitlines()) < 40
    (tmp_path / "mine.py").write_text(method)
    option = tmp_path / "options" / "method" / "mine.yaml"
    option.parent.mkdir(parents=True)
    option.write_text(options)
    command = [
        *(sys.executable, "-m", "okddip.main", "--config-dir", "options", "method=mine", "dataset=digits"),
        *(
            "model=resnet8",
            "trainer.epochs=1",
            "trainer.limit_batches=2",
            "tracking=none",
            "hydra.run.dir=run",
        ),
    ]
    finished = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{installed}:{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert "3 peers (branch)" in finished.stdout
    assert checkpoint.load(tmp_path / "run" / "last.pt")["config"]["method"]["_target_"] == "mine.Mine"
    [results] = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    averages = [results[f"test/ema/peer{peer}/top1"] for peer in range(3)]
    assert results["test/top1"] == results["test/ema/mean/top1"] == pytest.approx(sum(averages) / 3)
    listed = subprocess.run(
        [sys.executable, "-m", "okddip.main", "multirun_presets=nope"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert "quickstart" in listed.stderr
