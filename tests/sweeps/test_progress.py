"""What the terminal shows of a sweep as it goes on."""

import datetime
import io
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from okddip.sweeps import progress as shown
from okddip.sweeps.outcomes import Outcome, write_outcome
from okddip.text import ONCE, LogFormatter


def write(folder: Path, *kinds: str, seconds: float = 60) -> None:
    for job, kind in enumerate(kinds):
        (folder / str(job)).mkdir()
        write_outcome(Outcome(job, [], kind, start="now", seconds=seconds), folder / str(job))


def test_a_sweep_says_how_many_jobs_are_done_and_when_all_will_be(tmp_path: Path) -> None:
    write(tmp_path, "finished", "finished before", "failed", "finished")
    said = shown.progress(tmp_path, "now", 14)
    end = datetime.datetime.now() + datetime.timedelta(minutes=10)
    assert said.startswith("4 of 14 done, 10 left until ")
    assert said.endswith("(in 0:10:00)")
    assert f"{end:%Y-%m-%d}" in said or end.hour == 0
    assert shown.progress(tmp_path, "now", 4) == "4 of 4 done"
    assert shown.progress(tmp_path, "now", 0) == "4 done"  # nobody knows how many there are
    assert shown.progress(tmp_path, "another start", 4) == "0 of 4 done, 4 left"


def test_jobs_side_by_side_are_expected_to_go_on_so() -> None:
    done = [Outcome(0, [], "finished", seconds=60), Outcome(1, [], "skipped", seconds=1)]
    assert shown.expected_seconds(done, running=0, waiting=3) == 180
    assert shown.expected_seconds(done, running=2, waiting=5) == 120  # three at a time, two of them half done
    assert shown.expected_seconds(done[1:], running=2, waiting=5) is None


def printed_by(job: int, configured: Callable[..., DictConfig], tmp_path: Path) -> str:
    """What a job prints where Hydra has made its handlers."""
    configured("hydra/launcher=basic", f"hydra.sweep.dir={tmp_path}")
    stream, root = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter("%(message)s"))
    log = logging.getLogger("okddip.test")
    log.setLevel(logging.INFO)
    before, root.handlers = root.handlers, [handler]
    try:
        shown.label_lines(job)
        log.info("No CUDA device", extra=ONCE)
        log.info("No run in %s", f"folder{job}", extra=ONCE)
        log.warning("milestones lie past the last epoch")
        log.warning("seed %d is odd", job)
        log.info("epoch 1/1\nloss")
    finally:
        root.handlers = before
    return stream.getvalue()


def test_lines_name_their_job_and_what_all_have_to_say_is_said_once(
    configured: Callable[..., DictConfig], tmp_path: Path
) -> None:
    assert printed_by(0, configured, tmp_path).splitlines() == [
        *("#0 No CUDA device", "#0 No run in folder0", "#0 milestones lie past the last epoch"),
        *("#0 seed 0 is odd", "#0 epoch 1/1", "#0 loss"),
    ]
    # as from another process: what was said is in the sweep's folder
    assert printed_by(1, configured, tmp_path).splitlines() == ["#1 seed 1 is odd", "#1 epoch 1/1", "#1 loss"]


def test_what_did_not_begin_has_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from okddip.sweeps.summary import print_summary
    from okddip.sweeps.sweep import Sweep

    sweep = Sweep("seed", tmp_path, jobs=[[f"seed={seed}"] for seed in range(14)])
    print_summary(sweep, sweep.all_outcomes(), "KILLED", None)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "Sweep seed, 14 jobs: 14 not started."
    assert second.startswith("not started #0, #1, #2, #3, #4, #5, #6, #7 and 6 more: the sweep")
