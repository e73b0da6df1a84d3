"""The README: its length, and its commands and snippets, run in order in one fresh folder."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from program import REPOSITORY, Program
from sklearn.datasets import load_digits

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
# a block of code, and the file that it is to stand in, where the line before it names one
BLOCK = re.compile(
    r"(?:`([\w/]+\.\w+)`:\n\n)?^```(bash|python|yaml)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE
)

NOT_RUN = {  # what a line contains, and why it is not run here
    "pip install -e '.[dev]'": "CI runs it before these tests",
    "submitit_slurm": "needs a cluster",
    "--nnodes=2": "needs two machines",
    "--nproc-per-node=4": "needs four GPUs; tests/distributed has two ranks on a CPU",
    "tests/cuda": "needs a GPU; tests/cuda/test_measure.py tries it on a CPU",
}
OWN_CODE = "PYTHONPATH=. "  # before a command whose method is in the folder
SERVERS = ("mlflow ui", "mlflow models serve")  # go on until what follows them was run


def shortened(words: list[str]) -> list[str]:
    """A command whose training is short, on images that are there."""
    if any(word.startswith(("task=report", "task=evaluate", "task=export", "--help")) for word in words):
        return words
    small = {"trainer.epochs": "2", "trainer.limit_batches": "2", "trainer.precision": "fp32"}
    needs = " ".join(words)
    if "experiment=quickstart" not in needs and "=quickstart" not in needs and "image_folder" not in needs:
        small |= {"dataset": "digits", "model": "resnet8"}
    if "presets=quickstart" in needs or "presets=methods" in needs:
        small |= {"method": "baseline,okddip", "seed": "0"}
    if "imagenet" in needs:
        small = {"trainer.epochs": "1", "trainer.limit_batches": "1"}
        small |= {"trainer.batch_size": "4", "model": "resnet18"}
    if "task=benchmark" in needs:
        small |= {"benchmark.repeats": "1", "benchmark.warmup": "1", "benchmark.seconds": "0.01"}
        small |= {"trainer.batch_size": "4", "trainer.eval_batch_size": "4"}
    if "benchmark.settings=all" in needs:
        del small["trainer.precision"]
    return words + [f"{key}={value}" for key, value in small.items() if f"{key}=" not in needs]


def test_the_readme_is_read_in_ten_minutes() -> None:
    assert len(README.splitlines()) <= 250


def commands(block: str) -> list[str]:
    """The commands of a block, without their comments; a line that ends in a backslash goes on."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"\s+# .*$|^# .*$", "", line).strip() for line in lines) if line]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A fresh folder with the images that the README speaks of."""
    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * 16).clip(0, 255).astype(np.uint8)
    for root, size, parts in (("my_images", 16, ("train", "test")), ("imagenet", 64, ("train", "val"))):
        for index in range(80):  # in both parts of each class
            place_in_class = int(np.flatnonzero(labels == labels[index]).searchsorted(index))
            part = parts[place_in_class % 4 == 3]
            place = tmp_path / root / part / f"digit{labels[index]}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[index]).resize((size, size)).convert("RGB").save(place / f"{index}.png")
    return tmp_path


@contextmanager
def server(command: str, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """A server that the README starts, on the port that it names, while its block goes on."""
    port = int(found[1]) if (found := re.search(r"--port (\d+)", command)) else 5000
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, f"{command} ended by itself"
            time.sleep(0.1)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.mark.slow
def test_the_readmes_commands_and_snippets_run_in_order_in_a_fresh_folder(folder: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    ran: list[str] = []
    for file, language, block in BLOCK.findall(README):
        if file:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(block)
            continue
        if language == "python":
            snippet = "import numpy\nimages = numpy.zeros((2, 16, 16, 1), dtype='uint8')\n" + block
            succeeds(Program(folder, code=snippet), block)
            ran.append(block)
            continue
        waiting = ""
        for command in commands(block):
            if any(part in command for part in NOT_RUN):
                continue
            command = command.removeprefix("pip install . && ").replace("/data/imagenet", "imagenet")
            command = command.replace("train_size=5000", "train_size=500")  # there are fewer digits
            if "outputs/NAME/TIME" in command:
                last = max(folder.glob("outputs/*/*/last.pt"), key=lambda path: path.stat().st_mtime)
                command = command.replace("outputs/NAME/TIME", str(last.parent))
            if command.startswith(SERVERS):
                waiting = command
                continue
            if waiting.startswith("mlflow models serve"):
                with server(waiting, folder, environment):
                    answer = run(
                        ["bash", "-ec", command.replace("curl ", "curl -sSf ")], folder, environment, command
                    )
                assert "probabilities" in answer
            elif command.removeprefix(OWN_CODE).startswith("okddip "):
                words = shlex.split(command.removeprefix(OWN_CODE))[1:]
                places = [str(folder)] if command.startswith(OWN_CODE) else []
                path = os.pathsep.join([*places, str(REPOSITORY)])
                succeeds(Program(folder, *shortened(words), PYTHONPATH=path), command)
            else:
                run(["bash", "-ec", command], folder, environment, command)
            ran.append(command)
        if waiting.startswith("mlflow ui"):
            with server(waiting, folder, environment):
                pass
    assert len(ran) > 12


def succeeds(program: Program, shown: str) -> None:
    output, _ = program.communicate(timeout=600)
    assert program.returncode == 0, f"{shown}\n{output[-6000:]}"


def run(command: list[str], folder: Path, environment: dict[str, str], shown: str) -> str:
    finished = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, f"{shown}\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"
    return finished.stdout


def test_what_the_readme_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []
