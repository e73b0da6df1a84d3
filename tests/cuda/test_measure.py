"""The program that measures a GPU runs to its end on a CPU, without MLflow, and keeps to its time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import measure
import pytest
from conftest import folders_of_images

# as on a machine that has a few wheels beside PyTorch
WITHOUT = """
from functools import partial
from importlib.machinery import PathFinder

absent = {"mlflow", "pandas", "matplotlib", "safetensors", "onnx", "onnxscript", "psutil"}

def find_spec(find, name, path=None, target=None):
    return None if name.partition(".")[0] in absent else find(name, path, target)

PathFinder.find_spec = partial(find_spec, PathFinder.find_spec)
"""


def options(tmp_path: Path, budget: float) -> list[str]:
    return ["--device=cpu", "--tiny", f"--budget={budget}", f"--out={tmp_path}/out.json"]


@pytest.mark.slow
def test_it_runs_to_its_end_on_a_cpu_without_mlflow(tmp_path: Path) -> None:
    folders_of_images(tmp_path / "images", "a", "b", seed=0)
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "sitecustomize.py").write_text(WITHOUT)
    command = [sys.executable, measure.__file__, *options(tmp_path, 1800), f"--images={tmp_path}/images"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "few")}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    parts = report["parts"]
    assert list(parts) == list(measure.SHARES)
    assert not [part["error"] for part in parts.values() if "error" in part]
    assert parts["tests"]["counts"]["passed"] >= 1
    assert parts["tests"]["failed"] == []
    assert parts["benchmark"]["okddip branch"]["step"]["seconds"]["median"] > 0
    assert parts["epochs"]["fp32"]["epoch_seconds"] > 0
    side = parts["side-by-side"]
    two = side["without MPS"]["2"]
    assert "code" not in two
    assert [job["epochs"] for job in two["jobs"]] == [40, 40]
    # a busy machine may begin the second when the first has ended
    assert two.get("runs_an_hour", 0) > 0 or two["reason"] == "they never trained all at once"
    assert "stopped" not in two
    assert side["with MPS"] == {"reason": "nvidia-cuda-mps-control is not here"}
    assert parts["paper"]["uncompiled"]["seconds_of_300_epochs"] > 0


def test_what_takes_too_long_is_stopped_and_what_was_learned_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["measure.py", *options(tmp_path, 60)])
    monkeypatch.setattr(measure, "LEAST", 0.3)
    monkeypatch.setattr(measure, "END_SECONDS", 0.2)
    sleep = "import time; print('begun', flush=True); time.sleep(100)"
    seen = []

    def sleeps(measurement: measure.Measurement, facts: dict[str, object]) -> None:
        measurement.limit = time.monotonic() - measurement.began + 0.8
        facts["first"] = 1
        assert measurement.run("sleep", "-c", sleep, facts=facts) is not None
        measurement.limit = measure.END_SECONDS
        assert measurement.run("another", "-c", sleep, facts={}) is None
        seen.append(json.loads((tmp_path / "out.json").read_text())["parts"]["tests"])
        raise ValueError("something else")

    monkeypatch.setattr(measure, "PARTS", {"tests": sleeps, "paper": measure.run_paper})
    started = time.monotonic()
    measure.main()
    assert time.monotonic() - started < 20
    report = json.loads((tmp_path / "out.json").read_text())
    assert seen[0]["stopped"] is True
    assert report["parts"]["tests"]["first"] == 1
    assert report["parts"]["tests"]["error"] == "ValueError: something else"
    assert report["parts"]["paper"] == {"reason": "no --images were given"}


def test_runs_side_by_side_count_while_all_of_them_train() -> None:
    equal = [[0.0, 1.0, 2.0, 3.0]] * 2
    assert measure.speed_together(equal, 100) == pytest.approx(200)
    later = [[0.0, 1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]  # the second takes twice as long, and begins at 2 s
    assert measure.speed_together(later, 100) == pytest.approx(150)
    assert measure.speed_together([[0.0, 1.0], [1.0, 2.0]], 100) is None
    assert measure.speed_together([[0.0, 1.0], []], 100) is None


CONTROL = """#!/bin/sh
if [ "$1" = -d ]; then
    sleep 30 &  # a daemon keeps the files that it was given
    echo $! > "$CUDA_MPS_PIPE_DIRECTORY/daemon"
    exit $FAIL
fi
cat > "$CUDA_MPS_PIPE_DIRECTORY/told"
kill "$(cat "$CUDA_MPS_PIPE_DIRECTORY/daemon")"
"""


@pytest.mark.parametrize("fail", ["0", "3"])
def test_mps_is_started_and_ended_or_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: str
) -> None:
    control = tmp_path / "nvidia-cuda-mps-control"
    control.write_text(CONTROL)
    control.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("FAIL", fail)
    monkeypatch.setattr(sys, "argv", ["measure.py", *options(tmp_path, 60)])
    settings = SimpleNamespace(device="cuda", tiny=True, out=tmp_path / "out.json", budget=60)
    monkeypatch.setattr(measure, "machine", lambda device: {})
    started = time.monotonic()
    with measure.mps(measure.Measurement(settings, tmp_path)) as (variables, reason):
        assert reason == ("" if fail == "0" else "MPS does not start: it says nothing")
        assert bool(variables) == (fail == "0")
    assert time.monotonic() - started < 15
    folder = Path(variables["CUDA_MPS_PIPE_DIRECTORY"]) if variables else None
    assert folder is None or (folder / "told").read_text() == "quit -t 10\n"


def test_epochs_are_timed_without_the_first(tmp_path: Path) -> None:
    lines = [
        {"timestamp_ms": 1000 * at, "train/images_per_second": speed, "test/top1": at}
        for at, speed in ((0, 10.0), (2, 100.0), (4, 110.0), (7, 120.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"ti')
    assert measure.epochs_of(tmp_path) == {
        "epochs": 4,
        "epoch_seconds": 2,
        "first_images_per_second": 10,
        "images_per_second": 110,
        "test_top1": 7,
    }
    assert measure.epochs_of(tmp_path / "absent") == {"epochs": 0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert measure.epochs_of(tmp_path) == {"epochs": 1, "first_images_per_second": 10}


def test_the_parts_of_a_call_share_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {}

    def look(measurement: measure.Measurement, facts: dict[str, object]) -> None:
        limits[len(limits)] = measurement.limit

    monkeypatch.setattr(measure, "PARTS", dict.fromkeys(measure.SHARES, look))
    images = tmp_path / "images"
    folders_of_images(images, "a", "b", seed=0)
    arguments = [*options(tmp_path, 90), f"--images={images}", "--parts", "paper", "epochs"]
    monkeypatch.setattr(sys, "argv", ["measure.py", *arguments])
    measure.main()
    epochs, paper = measure.SHARES["epochs"], measure.SHARES["paper"]
    assert list(limits.values()) == pytest.approx([90 * epochs / (epochs + paper), 90])
    assert list(json.loads((tmp_path / "out.json").read_text())["parts"]) == ["epochs", "paper"]


def test_what_tests_record_and_why_some_are_skipped_is_found_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "def test_a(record_property): record_property('copies_us', 12)\n"
        "def test_b(): __import__('pytest').skip('no time')\n"
    )
    results = tmp_path / "results.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
    subprocess.run([*command, str(tmp_path / "test_it.py")], check=True, capture_output=True)
    cases = measure.cases_in(results)
    assert measure.properties_of(cases) == {"test_a": {"copies_us": "12"}}
    assert measure.skipped_in(cases) == {"test_b": "no time"}
    results.write_text(results.read_text()[:100])  # as one that was killed
    assert measure.cases_in(results) == measure.cases_in(tmp_path / "absent.xml") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_measurement_that_is_stopped_keeps_what_it_has_and_leaves_no_command_behind(
    tmp_path: Path, number: int
) -> None:
    """By whoever lends the machine, say; the command has a session of its own."""
    code = f"""
import os, sys, time
sys.path.insert(0, {str(Path(measure.__file__).parent)!r})
import measure

def sleeps(measurement, facts):
    command = "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN);" \
        "open('pid', 'w').write(str(os.getpid())); time.sleep(100)"
    facts["before"] = 1
    pid = measurement.folder / "pid"
    measurement.run("sleep", "-c", command, facts=facts, learn=lambda: {{"learned": pid.exists()}})

measure.PARTS = {{"tests": sleeps}}
measure.END_SECONDS = 1
measure.main()
"""
    command = [sys.executable, "-c", code, *options(tmp_path, 60), f"--folder={tmp_path}/work"]
    process = subprocess.Popen(command, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    pid = tmp_path / "work" / "pid"
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)  # is no reason to leave the command
    assert process.wait(30) == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    facts = json.loads((tmp_path / "out.json").read_text())["parts"]["tests"]
    assert (facts["before"], facts["learned"], facts["stopped"]) == (1, True, True)
    again = subprocess.run(command, capture_output=True, text=True)
    assert "must be empty" in again.stderr


def test_a_closed_terminal_does_not_stop_a_measurement_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with measure.stops_end_the_command():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == measure.leave
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) != measure.leave
    finally:
        signal.signal(signal.SIGHUP, before)
