"""All that one GPU can tell in a few minutes, without network: tests, speeds, epochs, runs side by side.

    python tests/cuda/measure.py --images cifar10 --out cuda.json --budget 480
    python tests/cuda/measure.py --images cifar10 --out rest.json --parts epochs side-by-side paper

Beside PyTorch and torchvision it takes the wheels of hydra-core, omegaconf, antlr4-python3-runtime, tqdm,
scikit-learn and pytest with what they require, and for runs side by side that of hydra-joblib-launcher;
without matplotlib, safetensors and MLflow the tests of evaluation, export and serving are skipped. What has
been learned is written to the file every few seconds: a measurement that is cut off keeps what it has. A part
that takes longer than its share of the budget is stopped; what it leaves over goes to those after it. Where
one call is too short for all, `--parts` names those of a call, which share its budget. `compiled`, the tests
that compile every method, takes as long as all others, and is done only where it is named.
`--device cpu --tiny` tries the program itself on any machine.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
EPOCHS = 300  # of the paper's run
BUDGET = 480  # seconds, on an H100
SHARES = {"tests": 130, "benchmark": 140, "epochs": 45, "side-by-side": 75, "paper": 90}  # of these
COMPILED = "compiled"  # the part beside them, which takes as long as all
LEAST = 5  # seconds for a command to begin at all
SAVE_SECONDS = 5  # between two looks at what a command in progress has learned
END_SECONDS = 10  # that a command gets to end after it has been stopped
OUTCOME = re.compile(r"^(.+?::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)", re.MULTILINE)


class Ended(NamedTuple):
    """What became of a command."""

    code: int | None  # None: it was stopped
    began: float  # seconds since 1970
    output: str


class Measurement:
    """Where everything is written, and how much time is left."""

    def __init__(self, settings: argparse.Namespace, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.tiny = bool(settings.tiny)
        self.began = time.monotonic()
        self.limit = 0.0  # of the part in progress, in seconds since the beginning
        self.report: dict[str, Any] = {
            "command": " ".join(sys.argv),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "budget": settings.budget,
            "folder": str(folder),
            "machine": machine(settings.device),
            "parts": {},
        }
        self.save()

    def save(self) -> None:
        """Write all that is known, whole or not at all."""
        out: Path = self.settings.out
        new = out.with_name(out.name + ".new")
        new.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        new.replace(out)

    @contextmanager
    def part(self, name: str) -> Iterator[dict[str, Any]]:
        """Where the facts of a part go; its limit is what it and all parts before it may take."""
        shares = {each: SHARES.get(each, BUDGET) for each in parts_of(self.settings)}
        until = list(shares).index(name) + 1
        self.limit = self.settings.budget * sum([*shares.values()][:until]) / sum(shares.values())
        facts: dict[str, Any] = {}
        self.report["parts"][name] = facts
        started = time.monotonic()
        print(f"{name}: {self.seconds_left():.0f} s", flush=True)
        try:
            yield facts
        except Exception as error:  # the parts after it have their own to tell
            facts["error"] = f"{type(error).__name__}: {error}"
        finally:
            facts["seconds"] = round(time.monotonic() - started, 1)
            self.save()
        print(json.dumps({name: facts})[:600], flush=True)

    def seconds_left(self) -> float:
        """For the part in progress."""
        return self.limit - (time.monotonic() - self.began)

    def run(
        self,
        name: str,
        *command: str,
        facts: dict[str, Any],
        learn: Callable[[], dict[str, Any]] = dict,
        **variables: str,
    ) -> Ended | None:
        """Run a command in the folder until its time is over; None if there is none left.

        Args:
            name: of its log.
            command: for Python.
            facts: take what `learn` returns, again and again, and how the command ended.
            variables: of the environment.
        """
        limit = self.seconds_left()
        if limit < LEAST + END_SECONDS:
            facts["reason"] = "there was no time left"
            return None
        log = self.folder / f"{name}.log"
        environment = os.environ | {
            "PYTHONUNBUFFERED": "1",  # what a part that is stopped has said is kept
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OKDDIP_CACHE": str(self.folder / "cache"),
            # of each command its own: what another has compiled would make its start look quick
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / f"{name}-compiled"),
            **variables,
        }
        code: int | None = None
        started, began = time.monotonic(), time.time()
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=self.folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            while code is None and (left := started + limit - END_SECONDS - time.monotonic()) > 0:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(min(SAVE_SECONDS, left))
                facts |= learn()
                self.save()
        finally:
            end(process)
            said = log.read_text(encoding="utf-8", errors="replace")
            facts["seconds"] = round(time.monotonic() - started, 1)
            if code is None:
                facts |= {"stopped": True, "output": said[-3000:]}
            elif code:
                facts |= {"code": code, "output": said[-3000:]}
            facts |= learn()
            self.save()
        return Ended(code, began, said)

    def okddip(
        self,
        name: str,
        *overrides: str,
        facts: dict[str, Any],
        learn: Callable[[], dict[str, Any]],
        **variables: str,
    ) -> Ended | None:
        """Run the program; see `run`."""
        given = ["tracking=none", f"trainer.device={self.settings.device}"]
        if self.tiny:
            given += ["model=resnet8", "trainer.batch_size=8", "trainer.eval_batch_size=8"]
        return self.run(name, "-m", "okddip.main", *overrides, *given, facts=facts, learn=learn, **variables)


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a command and what it has started: they may say goodbye first, pytest which tests failed why."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        until, told = time.monotonic() + END_SECONDS / 2, False
        while time.monotonic() < until:
            process.poll()  # else it stays in its group when it has ended
            try:
                os.killpg(process.pid, 0 if told else number)
            except (ProcessLookupError, PermissionError):
                return
            told = True
            time.sleep(0.02)


def machine(device: str) -> dict[str, Any]:
    """What is measured, and with what."""
    facts: dict[str, Any] = {
        "python": sys.version.split()[0],
        **{name: installed(name) for name in ("torch", "torchvision", "triton")},
        "commit": first_line_of("git", "-C", str(REPOSITORY), "rev-parse", "HEAD"),
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
    }
    if device != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": first_line_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts


def installed(name: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def first_line_of(*command: str) -> str | None:
    """What a command says first, None where there is no such command or it fails."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.partition("\n")[0].strip() or None


def run_tests(measurement: Measurement, facts: dict[str, Any]) -> None:
    """The tests of this folder that are quick."""
    run_marked(measurement, facts, "tests", "cuda and not slow")


def run_compiled(measurement: Measurement, facts: dict[str, Any]) -> None:
    """Those that compile every method, in both modes."""
    run_marked(measurement, facts, COMPILED, "cuda and slow")


def run_marked(measurement: Measurement, facts: dict[str, Any], name: str, marks: str) -> None:
    """The tests of this folder: outcomes, what those that measure found, and the output where one failed."""
    results = measurement.folder / f"{name}.xml"
    log = measurement.folder / f"{name}.log"

    def learn() -> dict[str, Any]:
        outcomes = OUTCOME.findall(log.read_text(encoding="utf-8", errors="replace"))
        words = [word for _, word in outcomes]
        return {
            "counts": {each.lower(): words.count(each) for each in ("PASSED", "FAILED", "ERROR", "SKIPPED")},
            "failed": [test.rpartition("/")[2] for test, word in outcomes if word in ("FAILED", "ERROR")],
        }

    chosen = ["-m", marks] if measurement.settings.device != "cpu" else ["-k", "cpu and copies"]
    ended = measurement.run(
        *(name, "-m", "pytest", "-v", "--tb=short", "--durations=15", "-p", "no:cacheprovider"),
        *("-o", "addopts=", f"--junitxml={results}", *chosen, str(REPOSITORY / "tests" / "cuda")),
        facts=facts,
        learn=learn,
    )
    cases = cases_in(results)
    facts["measured"], facts["skipped"] = properties_of(cases), skipped_in(cases)
    if ended is not None and facts["failed"]:
        facts["output"] = ended.output[-20_000:]


def cases_in(results: Path) -> list[ElementTree.Element]:
    """The tests in pytest's XML; none where it was stopped before it wrote that."""
    try:
        return list(ElementTree.parse(results).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return []


def properties_of(cases: Iterable[ElementTree.Element]) -> dict[str, dict[str, str]]:
    """What tests have recorded by pytest's `record_property`, by their names."""
    return {
        case.attrib["name"]: {each.attrib["name"]: each.attrib["value"] for each in found}
        for case in cases
        if (found := case.findall("properties/property"))
    }


def skipped_in(cases: Iterable[ElementTree.Element]) -> dict[str, str]:
    """Why tests were skipped, by their names."""
    return {
        case.attrib["name"]: skipped.attrib.get("message", "")
        for case in cases
        if (skipped := case.find("skipped")) is not None
    }


CONFIGURATIONS = {
    "okddip branch": ["method=okddip", "method.structure=branch"],
    "okddip network": ["method=okddip", "method.structure=network"],
    "dml": ["method=dml"],
    "baseline": ["method=baseline"],
}


def run_benchmarks(measurement: Measurement, facts: dict[str, Any]) -> None:
    """Each configuration on ResNet-32 beside the plain loop, then in fp32, bf16, compiled, by CUDA graphs.

    To compile takes long, so all have been compared with the plain loop before the first is compiled.
    """
    size = ["benchmark.image_size=8", "benchmark.repeats=1", "benchmark.seconds=0"]
    if not measurement.tiny:
        size = ["benchmark.repeats=5", "benchmark.seconds=0.1"]
    first, *others = CONFIGURATIONS
    jobs = [(name, "null") for name in others] + [(name, "all") for name in (first, *others)]
    for number, (name, settings) in enumerate([(first, "null")] if measurement.tiny else jobs):
        out = measurement.folder / f"benchmark-{number}.json"
        measurement.okddip(
            *(f"benchmark-{number}", "task=benchmark", "model=resnet32", "dataset=cifar10"),
            *(f"benchmark.settings={settings}", f"benchmark.out={out}", *size, *CONFIGURATIONS[name]),
            facts=facts.setdefault(name if settings == "null" or name == first else f"{name}, settings", {}),
            learn=partial(content_of, out),
        )


def content_of(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing before it is there."""
    return json.loads(file.read_text()) if file.exists() else {}


def images(measurement: Measurement) -> list[str]:
    """The overrides that name the images that are trained on."""
    return ["dataset=image_folder", f"dataset.root={measurement.settings.images}"]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """What a run says of each of its epochs; one that was stopped may have left the beginning of a line."""
    file = folder / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def epochs_of(folder: Path) -> dict[str, Any]:
    """How long the epochs of a run took, the first apart: it is compiled in, and libraries are loaded."""
    lines = lines_of(folder)
    if not lines:
        return {"epochs": 0}
    if len(lines) == 1:
        return {"epochs": 1, "first_images_per_second": round(lines[0]["train/images_per_second"])}
    times = [line["timestamp_ms"] / 1000 for line in lines]
    seconds = [later - earlier for earlier, later in pairwise(times)]
    speeds = [line["train/images_per_second"] for line in lines]
    return {
        "epochs": len(lines),
        "epoch_seconds": round(statistics.median(seconds), 3),
        "first_images_per_second": round(speeds[0]),
        "images_per_second": round(statistics.median(speeds[1:])),
        "test_top1": lines[-1].get("test/top1"),
    }


def run_epochs(measurement: Measurement, facts: dict[str, Any]) -> None:
    """Whole epochs, evaluation and checkpoint included, in both precisions and from both memories."""
    kinds = {  # by default bf16 where the device computes in it, and images on the device
        "fp32": ["trainer.precision=fp32"],
        "by default": [],
        "by default, images from the host": ["dataset.on_device=false"],
    }
    for number, (kind, overrides) in enumerate(kinds.items()):
        if measurement.tiny and number:
            return
        folder = measurement.folder / f"epochs-{number}"
        measurement.okddip(
            *(folder.name, *images(measurement), *overrides, f"hydra.run.dir={folder}"),
            "trainer.epochs=2" if measurement.tiny else "trainer.epochs=4",
            facts=facts.setdefault(kind, {}),
            learn=partial(epochs_of, folder),
        )


def run_side_by_side(measurement: Measurement, facts: dict[str, Any]) -> None:
    """How many runs an hour as many jobs on one GPU give, without and with NVIDIA's MPS."""
    if installed("hydra-joblib-launcher") is None:
        facts["reason"] = "hydra-joblib-launcher is not installed"
        return
    # what tells most comes first
    first, last = ((2,), ()) if measurement.tiny else ((1, 4, 8), (2,))
    without, beside = facts["without MPS"], facts["with MPS"] = {}, {}
    for jobs in first:
        run_jobs(measurement, without.setdefault(str(jobs), {}), f"jobs-{jobs}", jobs)
    with mps(measurement) as (variables, reason):
        if reason:
            beside["reason"] = reason
        for jobs in () if reason else (*first[1:], *last):
            run_jobs(measurement, beside.setdefault(str(jobs), {}), f"mps-{jobs}", jobs, **variables)
    for jobs in last:
        run_jobs(measurement, without.setdefault(str(jobs), {}), f"jobs-{jobs}", jobs)


def run_jobs(measurement: Measurement, facts: dict[str, Any], name: str, jobs: int, **variables: str) -> None:
    """So many runs side by side by joblib. Runs an hour are of the paper's length.

    What counts is the time in which all of them train: some begin later, and some end sooner. A checkpoint is
    written and a batch evaluated after each third of an epoch, where a whole run does more after a whole one.
    """
    folder = measurement.folder / name
    seeds = ",".join(map(str, range(jobs)))
    batches, epochs = (1, 40) if measurement.tiny else (130, 5)
    total = training_images(measurement.settings.images)
    images_of_epoch = min(batches * (8 if measurement.tiny else 128), total)

    def learn() -> dict[str, Any]:
        ends = [[line["timestamp_ms"] / 1000 for line in lines_of(folder / str(job))] for job in range(jobs)]
        learned: dict[str, Any] = {"jobs": [epochs_of(folder / str(job)) for job in range(jobs)]}
        speed = speed_together([times[:epochs][:-1] for times in ends], images_of_epoch)
        if speed is None:
            return learned | {"reason": "they never trained all at once"}
        hourly = {"images_per_second": speed, "runs_an_hour": round(3600 * speed / (EPOCHS * total), 2)}
        return learned | hourly | {"reason": None}

    measurement.okddip(
        *(name, "-m", *images(measurement), f"seed={seeds}", f"hydra.sweep.dir={folder}"),
        *("hydra.sweep.subdir=${hydra.job.num}", "hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"),
        *(f"trainer.limit_batches={batches}", f"trainer.epochs={epochs}", f"trainer.eval_every={epochs}"),
        facts=facts,
        learn=learn,
        **variables,
    )


def speed_together(ends: list[list[float]], images: int) -> float | None:
    """Images a second of several runs together, while all of them train.

    Args:
        ends: of each run, when each of its epochs ended, in seconds. The last one evaluates too and is left
            out; before the end of the first it is not known whether it trains.
        images: of an epoch.

    Returns:
        None where there was no such time.
    """
    if not all(ends):
        return None
    start, stop = max(times[0] for times in ends), min(times[-1] for times in ends)
    if start >= stop:
        return None
    epochs = sum(float(np.diff(np.interp([start, stop], times, range(len(times))))[0]) for times in ends)
    return images * epochs / (stop - start)


def training_images(folder: Path) -> int:
    return sum(1 for path in folder.glob("train/*/*") if path.is_file())


@contextmanager
def mps(measurement: Measurement) -> Iterator[tuple[dict[str, str], str]]:
    """The variables with which commands share the GPU by MPS, and, where it does not start, the reason."""
    control = shutil.which("nvidia-cuda-mps-control")
    if measurement.settings.device == "cpu" or control is None:
        yield {}, "nvidia-cuda-mps-control is not here"
        return
    folder = Path(tempfile.mkdtemp(prefix="mps-"))  # its sockets take short paths alone
    variables = {"CUDA_MPS_PIPE_DIRECTORY": str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder)}
    environment = os.environ | variables
    try:
        reason = start_mps([control, "-d"], environment, folder / "start.log")
        yield ({}, f"MPS does not start: {reason}") if reason else (variables, "")
    finally:
        with suppress(subprocess.SubprocessError, OSError):
            subprocess.run([control], input="quit -t 10\n", text=True, env=environment, timeout=30)


def start_mps(command: list[str], environment: dict[str, str], log: Path) -> str:
    """Why MPS does not start; empty where it does."""
    with log.open("w") as output:  # no pipe: the daemon would keep it open, and its end would be waited for
        try:
            started = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=20,
            )
        except (subprocess.TimeoutExpired, OSError) as error:
            return str(error)
    return log.read_text(errors="replace").strip()[:500] or "it says nothing" if started.returncode else ""


def run_paper(measurement: Measurement, facts: dict[str, Any]) -> None:
    """The paper's run as far as it gets, in bf16 with CUDA graphs or else uncompiled; what 300 epochs take.

    The time of all epochs has in it to compile from nothing, and to read the images where no part before did.
    """
    kinds = {
        "CUDA graphs": [
            *("trainer.precision=bf16", "trainer.compile=true", "trainer.compile_mode=reduce-overhead"),
        ],
        "uncompiled": ["trainer.precision=bf16"],
    }
    if measurement.settings.device == "cpu":
        kinds = {"uncompiled": []}
    for number, (kind, overrides) in enumerate(kinds.items()):
        folder = measurement.folder / f"paper-{number}"
        run = facts.setdefault(kind, {})
        ended = measurement.okddip(
            *(folder.name, "experiment=cifar10", *images(measurement), *overrides, f"hydra.run.dir={folder}"),
            f"trainer.epochs={2 if measurement.tiny else EPOCHS}",
            facts=run,
            learn=partial(epochs_of, folder),
        )
        if ended and "epoch_seconds" in run:
            first = lines_of(folder)[0]["timestamp_ms"] / 1000 - ended.began
            run["seconds_of_the_first_epoch"] = round(first, 1)  # from the program's start on
            run["seconds_of_300_epochs"] = round(first + (EPOCHS - 1) * run["epoch_seconds"])
            return


PARTS = {
    "tests": run_tests,
    "benchmark": run_benchmarks,
    "epochs": run_epochs,
    "side-by-side": run_side_by_side,
    "paper": run_paper,
    COMPILED: run_compiled,
}
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OF_IMAGES = ("epochs", "side-by-side", "paper")


def parts_of(settings: argparse.Namespace) -> list[str]:
    """The parts that are measured, in their order."""
    possible = [name for name in PARTS if settings.images is not None or name not in OF_IMAGES]
    return [name for name in possible if name in settings.parts]


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """All parts, one after the other."""
    folder = settings.folder or Path(tempfile.mkdtemp(prefix="measure-"))
    folder.mkdir(parents=True, exist_ok=True)
    measurement = Measurement(settings, folder.resolve())
    for name in parts_of(settings):
        with measurement.part(name) as facts:
            PARTS[name](measurement, facts)
    for name in settings.parts:
        measurement.report["parts"].setdefault(name, {"reason": "no --images were given"})
    measurement.report["seconds"] = round(time.monotonic() - measurement.began, 1)
    measurement.save()
    return measurement.report


def leave(number: int, frame: object) -> None:
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)  # once is enough: the command in progress is being ended
    raise SystemExit(128 + number)  # by way of every `finally`, so that no command is left on the GPU


@contextmanager
def stops_end_the_command() -> Iterator[None]:
    """Within it `leave` answers the signals that stop a program, but for those that are ignored (nohup)."""
    before = {number: signal.getsignal(number) for number in STOPS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--images", type=Path, help="CIFAR-10 as train/CLASS/* and test/CLASS/*")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(SHARES), help="to measure")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--folder", type=Path, help="for runs and caches; a temporary one by default")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: to try this program")
    settings = parser.parse_args()
    settings.out = settings.out.resolve()
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.images = settings.images and settings.images.resolve()
    if settings.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny tries this program")
    if settings.images is not None and not training_images(settings.images):
        parser.error(f"--images {settings.images}: has no images in train/CLASS/*")
    if settings.folder is not None and settings.folder.exists() and any(settings.folder.iterdir()):
        parser.error(f"--folder {settings.folder}: must be empty, as what is there would be taken for new")
    with stops_end_the_command():
        measure(settings)


if __name__ == "__main__":
    main()
