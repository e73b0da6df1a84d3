import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from okddip.errors import ConfigError
from okddip.files import append_line, write_text
from okddip.training import checkpoint


def state(epoch: int) -> dict[str, Any]:
    return {
        **{key: kind() for key, kind in (checkpoint.REQUIRED_KEYS | checkpoint.TRAINING_KEYS).items()},
        "config": {
            **{group: {} for group in checkpoint.CONFIG_GROUPS},
            **{"name": "run", "seed": 0, "trainer": {"epochs": 3}},
            "options": {"method": "baseline", "model": "resnet8", "dataset": "digits"},
        },
        **{"channels": 1, "image_size": [8, 8], "mean": [0.5], "std": [0.2]},
        "epoch": epoch,
        "group": {"weights": torch.full((1000,), float(epoch))},
    }


def test_the_one_before_is_kept_and_the_best_is_the_same_file(tmp_path: Path) -> None:
    checkpoint.save(state(0), tmp_path, best=True)
    checkpoint.save(state(1), tmp_path, best=True)
    assert (tmp_path / "best.pt").samefile(tmp_path / "last.pt")
    checkpoint.save(state(2), tmp_path, best=False)
    epochs = {
        name: checkpoint.load(tmp_path / f"{name}.pt")["epoch"] for name in ("last", "previous", "best")
    }
    assert epochs == {"last": 2, "previous": 1, "best": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt", "previous.pt"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoint.save(state(0), tmp_path, best=True)
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(state(1) | {"group": lambda: None}, tmp_path, best=True)
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named_and_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoint.save(state(0), tmp_path, best=True)
    (tmp_path / "last.new").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"last\.pt: cannot be written \(No space left"):
        checkpoint.save(state(1), tmp_path, best=True)
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 0


def test_an_altered_or_truncated_checkpoint_is_refused_by_name_or_reads_the_same(tmp_path: Path) -> None:
    checkpoint.save(state(3), tmp_path, best=False)
    path = tmp_path / "last.pt"
    whole = path.read_bytes()
    refusals = []
    random = Random(0)
    for trial in range(400):
        if trial % 4 == 0:
            altered = whole[: random.randrange(len(whole))]
        else:
            place = random.randrange(len(whole))
            altered = whole[:place] + bytes([whole[place] ^ (1 << random.randrange(8))]) + whole[place + 1 :]
        path.write_bytes(altered)
        try:
            read = checkpoint.load(path)
        except ConfigError as error:
            refusals.append(str(error))
        else:
            assert read["epoch"] == 3
            assert (read["group"]["weights"] == 3).all()
    assert len(refusals) > 200
    assert all(str(path) in refusal for refusal in refusals)


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(state(0), tmp_path, best=False)
    checkpoint.save(state(1), tmp_path, best=False)
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-100])
    assert checkpoint.load_last(tmp_path)["epoch"] == 0
    assert "last.pt: cannot be read" in caplog.text
    assert "previous.pt" in caplog.text
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 0  # and it is what the next one follows


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("harmed").touch, ())


def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path: Path) -> None:
    torch.save(state(0) | {"epoch": Malicious()}, tmp_path / "last.pt")
    with pytest.raises(ConfigError, match="cannot be read as a checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.slow
def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    program = (
        "import torch\nfrom pathlib import Path\nfrom okddip.training import checkpoint\n"
        "from test_checkpoint import state\n"
        "for epoch in range(10**6):\n"
        "    weights = torch.full((300_000,), float(epoch))\n"
        "    checkpoint.save(state(epoch) | {'group': {'weights': weights}}, Path('.'), best=True)\n"
    )
    paths = [Path(checkpoint.__file__).parents[2], Path(__file__).parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    for wait in (0.05, 0.11, 0.17):
        writer = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment)
        (tmp_path / "last.pt").unlink(missing_ok=True)
        while not (tmp_path / "last.pt").exists():
            time.sleep(0.01)
            assert writer.poll() is None
        time.sleep(wait)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        last = checkpoint.load(tmp_path / "last.pt")
        assert (last["group"]["weights"] == last["epoch"]).all()


FULL_DISK = """
import os, sys
from pathlib import Path
from test_checkpoint import state
from okddip.training import checkpoint
from okddip.errors import ConfigError
from okddip.files import append_line, write_text
folder = Path(sys.argv[1])
checkpoint.save(state(0), folder, best=True)
append_line(folder / "metrics.jsonl", "one")
for free in range(0, 12 * 4096, 4096):
    room = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - free)))
    refused = []
    for name, step in {
        "last.pt": lambda: checkpoint.save(state(1), folder, best=True),
        "run.json": lambda: write_text(folder / "run.json", "x" * 9000),
        "metrics.jsonl": lambda: append_line(folder / "metrics.jsonl", "y" * 9000),
    }.items():
        try:
            step()
        except ConfigError as error:
            assert f"{folder}/{name}: cannot be written (No space left on device)" in str(error), error
            refused.append(name)
    print(free, *refused)
    last = checkpoint.load(folder / "last.pt")
    assert last["epoch"] == ("last.pt" not in refused)
    assert (last["group"]["weights"] == last["epoch"]).all()
    (folder / "filler").unlink()
    checkpoint.save(state(0), folder, best=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_disk_of_any_fullness_is_named_and_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "fill.py").write_text(FULL_DISK)
    paths = [Path(checkpoint.__file__).parents[2], Path(__file__).parent]
    command = "mount -t tmpfs -o size=200k tmpfs disk && exec $PYTHON fill.py disk"
    answer = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
    )
    if "mount: " in answer.stderr or "unshare: " in answer.stderr:
        pytest.skip("no disk can be mounted here")
    assert answer.returncode == 0, answer.stderr
    assert "last.pt run.json metrics.jsonl" in answer.stdout


def test_a_folder_is_seen_onto_the_disk_after_its_files_are_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[Path, list[str]]] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((path, sorted(file.name for file in tmp_path.iterdir())))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    checkpoint.save(state(0), tmp_path, best=True)
    write_text(tmp_path / "run.json", "{}")
    append_line(tmp_path / "metrics.jsonl", "{}")
    folders = [files for path, files in synced if path == tmp_path]
    assert folders == [
        ["best.pt", "last.pt"],
        ["best.pt", "last.pt", "run.json"],
        ["best.pt", "last.pt", "metrics.jsonl", "run.json"],
    ]
