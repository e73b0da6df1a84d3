import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from okddip import checkpoint


def state(epoch: int) -> dict:
    return {"epoch": epoch, "weights": torch.full((1000,), float(epoch))}


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
        checkpoint.save({"epoch": 1, "weights": lambda: None}, tmp_path, best=True)
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt"]


def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    program = (
        "import torch\nfrom pathlib import Path\nfrom okddip import checkpoint\n"
        "for epoch in range(10**6):\n"
        "    weights = torch.full((300_000,), float(epoch))\n"
        "    checkpoint.save({'epoch': epoch, 'weights': weights}, Path('.'), best=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(checkpoint.__file__).parents[1])}
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
        assert (last["weights"] == last["epoch"]).all()
