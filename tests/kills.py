"""Kill the program at random moments, give the command again, and compare with runs that nothing interrupted.

    python tests/kills.py --kills 100 --out counts.json

A kill is survived if the command given again succeeds, and then: the weights are bit for bit those of an
uninterrupted run, every metric is in MLflow once an epoch, each run has ended as finished, and the store
calls no run running. What is lost is printed with its folder, which is kept.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mlflow import MlflowClient
from mlflow_stores import free_port, mlflow_server
from program import REPOSITORY, Program

from okddip.run.folder import RunFolder
from okddip.tracking.tracker import MLflow
from okddip.tracking.unsent import LOCK
from okddip.training import checkpoint

EPOCHS = 6
PLAIN = ("experiment=quickstart", "method=baseline", f"trainer.epochs={EPOCHS}", "trainer.limit_batches=2")
KD = (*PLAIN, "method=kd", "method.teacher=auto", "method.teacher_model=resnet14")
SWEEP = ("-m", *PLAIN, "seed=0,1")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LIMIT = 600.0  # seconds for a command
FILES = {"last.pt", "best.pt", "metrics.jsonl", "config.yaml", "command.txt"}  # artifacts
# of some runs: the logs of the processes that trained it, and what OKDDip has
OTHER_FILES = {"main.log", "resumed", "attention.csv", "attention.png"}


class Phase(NamedTuple):
    """What is interrupted, and when."""

    command: tuple[str, ...]
    begins: str  # glob in the folder of the kill: a file that appears when the phase begins; "" is the start
    lasts: float  # seconds; the kill comes at a random moment of them
    runs: int  # that are finished in the end
    lines: int = 0  # of metrics that there must be too
    new_store: bool = False
    server: bool = False


PHASES = {
    "start-up": Phase(PLAIN, "", 6, 1),
    "new store": Phase(PLAIN, "mlflow.db*[!k]", 2.3, 1, new_store=True),  # the lock comes before
    "training": Phase(PLAIN, "outputs/*/*/metrics.jsonl", 0.5, 1, lines=1),
    "checkpoint": Phase(PLAIN, "outputs/*/*/last.new", 0.01, 1),
    "uploads": Phase(PLAIN, "outputs/*/*/metrics.jsonl", 1, 1, lines=EPOCHS, server=True),
    "teachers": Phase(KD, "outputs/*/*/run.json", 8, 2),
    "sweeps": Phase(SWEEP, "multirun/*/*/run.json", 4, 2),
}


class Store(NamedTuple):
    uri: str  # as the command is given it, in a folder of its own
    experiment: str
    client: Callable[[], MlflowClient]


class Run(NamedTuple):
    """What is compared of a run that has ended."""

    weights: dict[str, torch.Tensor]
    metrics: list[dict[str, float]]  # of each epoch


def start(folder: Path, *command: str, imports: bool = False) -> "Program | subprocess.Popen[str]":
    """Begin a command; with the imports that a start of Python takes, or without."""
    environment = {"OKDDIP_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    if not imports:
        return Program(folder, *command, **environment)
    return subprocess.Popen(
        [sys.executable, "-m", "okddip.main", *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell lets its background jobs ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def end(folder: Path, process: "Program | subprocess.Popen[str]") -> int:
    """Wait for the end of a command; keeps what it said, and returns its exit code."""
    output, _ = process.communicate(timeout=LIMIT)
    with (folder / "output.txt").open("a") as file:
        file.write(output)
    assert process.returncode is not None
    return process.returncode


def ended_runs(folder: Path) -> dict[str, Run]:
    """Runs in a folder that came to their last epoch, by their identity."""
    found: dict[str, Run] = {}
    for path in [*folder.glob("outputs/*/*/last.pt"), *folder.glob("multirun/*/*/last.pt")]:
        state = checkpoint.load(path)
        if state["epoch"] == EPOCHS - 1:
            moments = {
                f"{name}{index}": value
                for index, values in state["optimizer"]["state"].items()
                for name, value in values.items()
                if isinstance(value, torch.Tensor)
            }
            epochs = RunFolder(path.parent).read_metrics()
            metrics = [
                {key: value for key, value in results.items() if key.startswith(("train/loss", "test/"))}
                for _, _, results in epochs
            ]
            identity = RunFolder(path.parent).metadata["identity"]
            found[identity] = Run({**state["group"], **state["method"], **moments}, metrics)
    return found


def differences(folder: Path, phase: Phase, store: Store, whole: dict[str, Run]) -> Iterator[str]:
    """What is not as if nothing had been interrupted."""
    ended = ended_runs(folder)
    if len(ended) != phase.runs or not ended.keys() <= whole.keys():
        yield f"runs that are finished: {sorted(ended)}, not {phase.runs} of {sorted(whole)}"
        return
    for identity, run in ended.items():
        theirs = whole[identity]
        if run.weights.keys() != theirs.weights.keys() or not all(
            torch.equal(run.weights[name], theirs.weights[name]) for name in run.weights
        ):
            yield f"{identity}: other weights"
        if run.metrics != theirs.metrics:
            yield f"{identity}: other metrics in metrics.jsonl"

    client = store.client()
    experiment = client.get_experiment_by_name(store.experiment)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    for run in runs:
        if run.info.status not in ("FINISHED", "KILLED"):
            yield f"MLflow run {run.info.run_id}: {run.info.status}"
    finished = [run for run in runs if run.info.status == "FINISHED"]
    parents = [run for run in finished if LOCK in run.data.tags]
    if len(parents) != (phase.command[0] == "-m"):
        yield f"{len(parents)} parents are finished"
    trained = [run for run in finished if run not in parents]
    if sorted(run.data.tags["identity"] for run in trained) != sorted(ended):
        yield f"{len(trained)} MLflow runs are finished"
    for run in trained:
        own = RunFolder(Path(run.data.tags["folder"]))
        epochs = own.read_metrics()
        told = {
            key: sorted(
                (point.step, point.timestamp, point.value)
                for point in client.get_metric_history(run.info.run_id, key)
            )
            for key in run.data.metrics
            if not key.startswith(("final/", "best/"))
        }
        lines: dict[str, list[tuple[int, int, float]]] = {}
        for epoch, timestamp_ms, results in epochs:
            for key in (key for key in results if "/attention/" not in key):  # which is in a file
                value = results[key]
                lines.setdefault(key, []).append((epoch, timestamp_ms, value))
        if told != lines:
            wrong = sorted(key for key in told.keys() | lines.keys() if told.get(key) != lines.get(key))
            yield f"MLflow run {run.info.run_id}: other metrics than metrics.jsonl has: {wrong}"
        if run.data.metrics.get("final/top1") != epochs[-1][2]["test/top1"]:
            yield f"MLflow run {run.info.run_id}: another final/top1"
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        if files - OTHER_FILES != FILES:
            yield f"MLflow run {run.info.run_id}: has the artifacts {sorted(files)}"
            continue
        with tempfile.TemporaryDirectory() as place:
            copy = Path(client.download_artifacts(run.info.run_id, "last.pt", place))
            if copy.read_bytes() != (own.path / "last.pt").read_bytes():
                yield f"MLflow run {run.info.run_id}: another last.pt"


def has_begun(folder: Path, phase: Phase) -> bool:
    if not phase.begins:
        return True
    paths = list(folder.glob(phase.begins))
    if phase.lines:
        return any(path.read_bytes().count(b"\n") >= phase.lines for path in paths)
    return bool(paths)


def kill(folder: Path, phase: Phase, store: Store, moments: random.Random) -> str | None:
    """Begin, and kill at a random moment of a phase; says when, or None if the command was quicker."""
    place = (f"tracking.uri={store.uri}", f"tracking.experiment={store.experiment}")
    process = start(folder, *phase.command, *place, imports=not phase.begins)
    number, moment = moments.choice(SIGNALS), moments.uniform(0, phase.lasts)
    while process.poll() is None and not has_begun(folder, phase):
        time.sleep(0.0002)
    time.sleep(moment)
    process.send_signal(number)
    return None if end(folder, process) == 0 else f"{number.name} after {moment:.3f} s"


def again(folder: Path, phase: Phase, store: Store) -> int:
    """Give the command again, as one does after a kill."""
    place = [f"tracking.uri={store.uri}", f"tracking.experiment={store.experiment}"]
    if phase.command[0] != "-m":  # a sweep does what is missing by itself
        place.append("trainer.resume=auto")
    return end(folder, start(folder, *phase.command, *place))


def uninterrupted(folder: Path) -> dict[str, Run]:
    """The runs of all phases, by their identity."""
    folder.mkdir()
    for command in (SWEEP, KD):
        code = end(folder, start(folder, *command, "tracking=none"))
        assert code == 0, (folder / "output.txt").read_text()
    return ended_runs(folder)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of an MLflow server, which keeps artifacts too."""
    folder.mkdir()
    port = free_port()
    options = ("--backend-store-uri", f"sqlite:///{folder}/served.db")
    options = (*options, "--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts")
    with mlflow_server(folder, port, *options):
        yield f"http://127.0.0.1:{port}"


def run(
    kills: int, folder: Path, seed: int = 0, phases: tuple[str, ...] = tuple(PHASES)
) -> dict[str, dict[str, Any]]:
    """Kill so many times, the phases in turn.

    Args:
        kills: how many.
        folder: absent or empty; afterwards it has what was lost.
        seed: of the moments.
        phases: of PHASES.

    Returns:
        For each phase the number of kills, of those survived, and what was lost.
    """
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    folder.mkdir(parents=True, exist_ok=True)
    moments = random.Random(seed)
    counts: dict[str, dict[str, Any]] = {
        name: {"kills": 0, "survived": 0, "too late": 0, "lost": []} for name in phases
    }
    whole = uninterrupted(folder / "uninterrupted")
    MLflow(f"sqlite:///{folder}/empty.db", "okddip").open()
    with ExitStack() as servers:
        address = ""
        while (done := sum(count["kills"] for count in counts.values())) < kills:
            name = phases[done % len(phases)]
            phase, count = PHASES[name], counts[name]
            if phase.server and not address:
                address = servers.enter_context(served(folder / "server"))
            place = folder / f"{done}-{name.replace(' ', '-')}-{count['too late']}"
            place.mkdir()
            uri = address if phase.server else "sqlite:///mlflow.db"
            if not (phase.server or phase.new_store):
                shutil.copy(folder / "empty.db", place / "mlflow.db")
            reader = address if phase.server else f"sqlite:///{place}/mlflow.db"
            store = Store(uri, place.name if phase.server else "okddip", lambda uri=reader: MlflowClient(uri))
            when = kill(place, phase, store, moments)
            if when is None:
                count["too late"] += 1
                shutil.rmtree(place)
                assert count["too late"] < 5 * kills, f"{name}: hardly any kill comes in time"
                continue
            count["kills"] += 1
            code = again(place, phase, store)
            wrong = [f"exit code {code}"] if code else list(differences(place, phase, store, whole))
            print(f"{name:<12}{when:<24}{'; '.join(wrong) or 'survived'}", flush=True)
            if wrong:
                count["lost"].append({"when": when, "folder": str(place), "wrong": wrong})
            else:
                count["survived"] += 1
                shutil.rmtree(place)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=len(PHASES), help="how many, over all phases")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--phases", default=",".join(PHASES), help="which, with commas")
    parser.add_argument("--out", type=Path, help="a JSON file for the counts")
    parser.add_argument("--folder", type=Path, help="for all runs; a temporary one by default")
    chosen = parser.parse_args()
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    counts = run(chosen.kills, folder.absolute(), chosen.seed, tuple(chosen.phases.split(",")))
    print(f"{'phase':<12}{'kills':>8}{'survived':>10}{'lost':>6}")
    for name, count in counts.items():
        print(f"{name:<12}{count['kills']:>8}{count['survived']:>10}{len(count['lost']):>6}")
    if chosen.out:
        chosen.out.write_text(json.dumps(counts, indent=1) + "\n")
    lost = sum(len(count["lost"]) for count in counts.values())
    print(f"{sum(count['kills'] for count in counts.values())} kills, {lost} lost; all runs: {folder}")
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
