"""Several ranks train one group as one process would, and end as one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
import torch
from conftest import Answer
from PIL import Image
from program import CLI, Program

from okddip import distributed
from okddip.data.loader import Share
from okddip.distributed.store import join
from okddip.training import checkpoint

Okddip = Callable[..., Answer]
SMALL = (
    *("dataset=digits", "model=resnet8", "method.peers=3", "optimizer.lr=0.02", "trainer.batch_size=96"),
    "trainer.limit_batches=5",  # more than the test set has
)


# torchrun with ranks that are forks of it, which spares each of them its imports
TORCHRUN = """
from program import become
from torch.distributed import run

settings_of = run.config_from_args


def settings_for_forks(options):
    settings, _, arguments = settings_of(options)
    return settings, lambda *arguments: become({code!r}, arguments), arguments


run.config_from_args = settings_for_forks
run.main()
"""


def torchrun(*arguments: str, options: Sequence[str], code: str = CLI) -> Program:
    options = (*options, "--start-method=fork", "--no-python", "okddip")
    return Program(Path.cwd(), *options, *arguments, code=TORCHRUN.format(code=code), apart=True)


def begin(ranks: int, *arguments: str, code: str = CLI) -> Program:
    return torchrun(*arguments, options=["--standalone", f"--nproc-per-node={ranks}"], code=code)


def run(ranks: int, *arguments: str, code: str = CLI) -> Answer:
    process = begin(ranks, *arguments, code=code)
    out, err = process.communicate(timeout=240)
    return Answer(process.wait(), out, err)


def real_torchrun(ranks: int, *overrides: str, restarts: int = 0) -> "subprocess.Popen[str]":
    """As a user starts it, imports and all."""
    options = ("--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}")
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, "-m", "okddip.main", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def epochs_done(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.glob("outputs/*/*/metrics.jsonl"))


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def tracked_runs(folder: Path) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return list(client.search_runs([client.get_experiment_by_name("okddip").experiment_id]))


@pytest.mark.parametrize("size", range(1, 20))
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_shares_are_the_whole_batch_and_no_image_is_alone(size: int, ranks: int) -> None:
    shares = [list(range(size))[Share(rank, ranks).of(size)] for rank in range(ranks)]
    assert [image for images in shares for image in images] == list(range(size))
    assert size == 1 or all(len(images) != 1 for images in shares)
    if size % ranks == 0 and size >= 2 * ranks:
        assert {len(images) for images in shares} == {size // ranks}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_give_the_losses_and_gradients_of_one_process(
    okddip: Okddip, tmp_path: Path, ranks: int
) -> None:
    teacher = ("method=baseline", "trainer.epochs=1", "trainer.limit_batches=2", "hydra.run.dir=teacher")
    assert okddip("dataset=digits", "model=resnet8", "tracking=none", *teacher).code == 0
    script = Path(__file__).with_name("rank_gradients.py").read_text()
    alone = Program(tmp_path, "one.pt", code=script)
    output, _ = alone.communicate(timeout=240)
    assert alone.returncode == 0, output
    together = run(ranks, "all.pt", code=script)
    assert together.code == 0, together.err
    one, several = torch.load("one.pt"), torch.load("all.pt")
    assert one.keys() <= several.keys()
    assert len(several) == 2 * len(one)
    for case in several:
        batches = one[case.removesuffix(" trainer.accumulate=4")]
        assert len(batches) == 2
        for (loss, gradients), (their_loss, their_gradients) in zip(batches, several[case], strict=True):
            assert their_loss == pytest.approx(loss, rel=1e-5), case
            for name, gradient in gradients.items():
                torch.testing.assert_close(
                    their_gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=f"{case}: {name}"
                )
        largest = max(gradient.abs().max() for _, gradients in batches for gradient in gradients.values())
        assert largest > 1e-2


@pytest.mark.slow
def test_rank_0_alone_writes_prints_and_tracks_and_every_test_image_counts_once(
    okddip: Okddip, tmp_path: Path
) -> None:
    answer = run(2, *SMALL, "trainer.epochs=2", "method.ema_decay=0.9")
    assert answer.code == 0, answer.err
    assert answer.out.count("epoch 1/2") == answer.out.count("test top-1") == 1
    [folder] = (tmp_path / "outputs").glob("*/*")
    assert {path.name for path in tmp_path.iterdir()} <= {
        *("outputs", "cache", "mlflow.db", "mlflow.db.lock", "mlartifacts")
    }
    [tracked] = tracked_runs(tmp_path)
    assert tracked.info.status == "FINISHED"
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert tracked.data.metrics["test/top1"] == last["test/top1"]
    assert tracked.data.params["ranks"] == "2"

    evaluated = okddip("task=evaluate", f"checkpoint={folder}", "hydra.run.dir=evaluation", "tracking=none")
    assert evaluated.code == 0, evaluated.err
    [numbers] = (tmp_path / "evaluation").glob("**/*.json")
    alone = json.loads(numbers.read_text())
    # of the averages too, of which each rank has answered for a half of the images
    for predictor in ("leader", "ema/leader", "ema/peer0"):
        assert alone["metrics"][f"{predictor}/top1"] == last[f"test/{predictor}/top1"]


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_ranks(okddip: Okddip, tmp_path: Path) -> None:
    command = (*SMALL, "tracking=none", "trainer.limit_batches=4")
    assert run(2, *command, "trainer.epochs=1").code == 0
    [folder] = (tmp_path / "outputs").glob("*/*")
    answer = run(4, *command, "trainer.epochs=2", f"trainer.resume={folder}")
    assert answer.code == 0, answer.err
    assert "resumes after epoch 1" in answer.out
    answer = okddip(*command, "trainer.epochs=3", f"trainer.resume={folder}")
    assert answer.code == 0, answer.err
    assert checkpoint.load(folder / "last.pt")["epoch"] == 2
    assert epochs_done(tmp_path) == 3


@pytest.mark.slow
def test_torchrun_restarts_a_run_of_which_a_rank_was_killed(tmp_path: Path) -> None:
    process = real_torchrun(2, *SMALL, "trainer.epochs=6", restarts=1)
    wait_for(lambda: epochs_done(tmp_path) >= 2)
    _, second = psutil.Process(process.pid).children()
    second.send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "resumes after epoch" in out
    assert len(list(tmp_path.glob("outputs/*/*/last.pt"))) == 1
    assert epochs_done(tmp_path) == 6
    [tracked] = tracked_runs(tmp_path)
    assert tracked.info.status == "FINISHED"
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    steps = [metric.step for metric in client.get_metric_history(tracked.info.run_id, "test/top1")]
    assert sorted(steps) == list(range(1, 7))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_ends_all_ranks_and_marks_the_run_killed(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = begin(2, *SMALL, "trainer.epochs=200")
    wait_for(lambda: epochs_done(tmp_path) >= 1)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not any(rank.is_running() for rank in ranks)
    assert "Resume with: " in out
    [tracked] = tracked_runs(tmp_path)
    assert tracked.info.status == "KILLED"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """ImageNet's folders, one file of which is not an image; the seed decides which rank reads it."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(8):
                pixels = rng.integers(256, size=(40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    (tmp_path / "images" / "train" / "cat" / "3.jpg").write_bytes(b"no image at all")
    return tmp_path / "images"


STREAMED = ("dataset=imagenet", "dataset.workers=0", "dataset.image_size=32", "dataset.resize=36")


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_of_them_with_its_message(images: Path, tmp_path: Path) -> None:
    answer = run(
        2,
        *(*STREAMED, f"dataset.root={images}", "dataset.bad_images=refuse", "model=resnet8"),
        *("method.peers=3", "trainer.batch_size=8", "trainer.epochs=3"),
    )
    assert answer.code == 1
    assert answer.err.count("3.jpg: ") == 1, answer.err
    [tracked] = tracked_runs(tmp_path)
    assert tracked.info.status == "FAILED"


@pytest.mark.slow
def test_streamed_images_that_a_rank_leaves_out_hold_no_other_up(images: Path) -> None:
    process = real_torchrun(
        4,
        *(*STREAMED, f"dataset.root={images}", "dataset.bad_images=skip", "model=resnet8", "tracking=none"),
        *("method.peers=3", "trainer.batch_size=8", "trainer.epochs=2"),
    )
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "epoch 2/2" in out
    assert out.count("cat/3.jpg: is not an image") == 2  # once an epoch, on whichever rank


@pytest.mark.slow
def test_ranks_wait_for_the_first_without_a_limit() -> None:
    """As for a teacher that another process trains, or for a large data set that is decoded."""
    answer = run(
        2,
        code="""
import datetime
import sys
import time
from okddip import distributed
distributed.group.TIMEOUT = datetime.timedelta(seconds=8)
with distributed.process_group():
    found = distributed.from_rank_0(lambda: time.sleep(10) or "teacher")
    with distributed.local_rank_0_first():
        time.sleep(10 if distributed.rank() == 0 else 0)
    found = distributed.from_rank_0(lambda: "and") and found
    sys.stdout.write(f"{distributed.rank()} {found}\\n")  # in one piece, unlike print
    sys.stdout.flush()
""",
    )
    assert answer.code == 0, answer.err
    assert sorted(answer.out.splitlines()) == ["0 teacher", "1 teacher"]


@pytest.mark.slow
def test_what_is_wrong_with_another_rank_alone_is_said() -> None:
    """Its machine lacks a package, say."""
    answer = run(
        2,
        *SMALL,
        code="""
import sys
from okddip import distributed
from okddip.main import cli
distributed.output.SECONDS_BEFORE_EXIT = 4
if distributed.rank() == 1:
    sys.argv.append("trainer.batchsize=96")
cli()
""",
    )
    assert answer.code == 1
    assert answer.err.count("trainer.batchsize=96: trainer.batchsize is not a setting") == 1, answer.err


def launch(*overrides: str, restarts: int = 0, code: str = CLI) -> list[Program]:
    """Two launchers of one rank each, as on two machines; the last override is that of one of them alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d")
    options += (f"--rdzv-endpoint=localhost:{port}", f"--max-restarts={restarts}")
    return [torchrun(*SMALL, *own, options=options, code=code) for own in (overrides[:-1], overrides)]


@pytest.mark.slow
def test_two_machines_train_one_group(tmp_path: Path) -> None:
    machines = launch("trainer.epochs=2", "name=${options.method}${method.peers}-x")
    said = [machine.communicate(timeout=240) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert sorted("epoch 2/2" in out for out, _ in said) == [False, True]
    assert epochs_done(tmp_path) == 2
    [tracked] = tracked_runs(tmp_path)
    assert tracked.info.status == "FINISHED"


@pytest.mark.slow
def test_machines_with_other_settings_are_refused(tmp_path: Path) -> None:
    machines = launch("tracking=none", "trainer.epochs=2", "seed=5")
    said = "".join(err for _, err in (machine.communicate(timeout=240) for machine in machines))
    assert [machine.returncode for machine in machines] == [1, 1], said
    assert said.count("Rank 1 would train another run than rank 0: ") == 1, said
    assert "seed is " in said
    assert not list(tmp_path.glob("outputs/*/*/last.pt"))


@pytest.mark.slow
def test_a_run_of_two_machines_goes_on_whichever_rank_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = launch("tracking=none", "trainer.epochs=8", "trainer.tf32=true", restarts=2)
    said = "".join(err for _, err in (machine.communicate(timeout=240) for machine in machines))
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all" in said

    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    code = f"from os import environ, getpid\nopen(environ['RANK'], 'w').write(str(getpid()))\n{CLI}"
    machines = launch("tracking=none", "trainer.epochs=8", "trainer.tf32=true", restarts=2, code=code)
    wait_for(lambda: epochs_done(tmp_path) >= 2)
    os.kill(int(Path("1").read_text()), signal.SIGKILL)
    said = [machine.communicate(timeout=240) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "resumes after epoch" in "".join(out for out, _ in said)
    assert epochs_done(tmp_path) == 8
    assert len(list(tmp_path.glob("outputs/*/*/metrics.jsonl"))) == 1


def test_several_processes_without_torchrun_are_refused(
    okddip: Okddip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer = okddip(*SMALL, "tracking=none")
    assert answer.code == 1
    assert "WORLD_SIZE=2: asks for several processes, but RANK, LOCAL_RANK" in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.slow
def test_a_split_without_a_readable_image_is_named_by_ranks_too(images: Path) -> None:
    for path in (images / "val").glob("*/*.jpg"):
        path.write_bytes(b"no image at all")
    answer = run(
        2,
        *(*STREAMED, f"dataset.root={images}", "dataset.bad_images=skip", "model=resnet8", "tracking=none"),
        *("method.peers=3", "trainer.batch_size=8", "trainer.epochs=1"),
    )
    assert answer.code == 1
    assert answer.err.count("no image that can be read") == 1, answer.err
    assert "ZeroDivisionError" not in answer.err


def test_a_failure_elsewhere_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("okddip.distributed.store._joined", [])
    assert not distributed.another_failed()
    group = join(torch.distributed.HashStore())
    assert not distributed.another_failed()
    assert group.record_failure() == 0
    assert not distributed.another_failed()  # it was this rank
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert distributed.another_failed()
    assert group.record_failure() == 0


@pytest.mark.slow
def test_kd_trains_its_teacher_in_all_ranks(tmp_path: Path) -> None:
    teacher = ("method=kd", "method.teacher=auto", "method.teacher_model=resnet14")
    command = ("dataset=digits", "model=resnet8", "trainer.epochs=1", "trainer.limit_batches=2", *teacher)
    answer = run(2, *command)
    assert answer.code == 0, answer.err
    assert "trained first" in answer.out
    assert {tracked.data.tags["method"] for tracked in tracked_runs(tmp_path)} == {"baseline", "kd"}
    answer = run(2, *command, "optimizer.momentum=0.8")
    assert answer.code == 0, answer.err


@pytest.mark.slow
def test_ranks_train_compiled_and_in_bf16(tmp_path: Path) -> None:
    answer = run(
        2, *SMALL, "tracking=none", "trainer.precision=bf16", "trainer.compile=true", "trainer.epochs=2"
    )
    assert answer.code == 0, answer.err
    [folder] = (tmp_path / "outputs").glob("*/*")
    losses = [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.batch_size=97"], "trainer.batch_size=97: must be divisible by ranks"),
        (
            ["trainer.batch_size=12", "trainer.accumulate=4"],
            "must be divisible by ranks x trainer.accumulate",
        ),
        (["method.peers=two"], "method.peers=two: must be a whole number"),
        (["trainer.batchsize=96"], "trainer.batchsize=96: trainer.batchsize is not a setting"),
        (["hydra.mode=MULTIRUN", "seed=0,1"], "A sweep does not run under torchrun"),
        (["task=evaluate", "checkpoint=last.pt"], "start it without torchrun"),
        (["trainer.sync_batch_norm=true"], "PyTorch synchronises batch norm on CUDA only"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_once(tmp_path: Path, overrides: list[str], message: str) -> None:
    answer = run(2, *SMALL, *overrides)
    assert answer.code == 1
    assert answer.err.count(message) == 1, answer.err
    assert not list(tmp_path.glob("outputs/*/*/last.pt"))
