"""`runs.csv`, whose lines stand beside a user's own runs once they lie with the package."""

from collections.abc import Callable
from pathlib import Path
from shutil import copy

import pandas as pd
import pytest
from conftest import Answer
from mlflow.entities import Run
from report_store import made_runs

from okddip.tasks.report import measured, tables
from okddip.tasks.report.compare import compare

COST = {"predictor": "leader", "parameters.trained": "300", "parameters.kept": "100", "flops.kept": "7000"}


def written(chosen: list[Run], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    tables.write_tables(compare(chosen), "", folder)
    return folder


@pytest.fixture
def package_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the one in the package; absent."""
    monkeypatch.setattr(measured, "FOLDER", tmp_path / "measured")
    measured.known_runs.cache_clear()
    return tmp_path / "measured"


def test_a_line_a_run_has_settings_results_and_costs(tmp_path: Path) -> None:
    chosen = [
        *made_runs("method=okddip", last=[93, 94], tags=COST),
        *made_runs("method=baseline", last=[92]),
    ]
    lines = pd.read_csv(written(chosen, tmp_path) / "runs.csv", keep_default_na=False)
    assert len(lines) == 3
    row = lines.set_index(["method", "seed"]).loc[("okddip", 1)]
    assert [float(row[name]) for name in ("last", "best", "ensemble")] == [94, 94.5, 95]
    costs = ("trained", "kept", "flops", "images_per_second")
    assert [float(row[name]) for name in costs] == [300, 100, 7000, 3200]
    assert (row["predictor"], row["method.peers"], row["trainer.epochs"]) == ("leader", 4, 12)
    assert (row["images.train"], row["started"][:4], row["device"]) == ("train images", "2001", "cpu")
    assert not [name for name in lines if name.endswith(("root", "cache_dir"))]  # nothing of where it was


def test_runs_of_the_same_regime_stand_beside_a_users_own(tmp_path: Path, package_data: Path) -> None:
    ours = [
        *made_runs("method=okddip", last=[93, 94], tags=COST),
        *made_runs("method=baseline", last=[92, 92.5]),
    ]
    package_data.mkdir()
    copy(written(ours, tmp_path / "ours") / "runs.csv", package_data / "cifar10.csv")
    measured.known_runs.cache_clear()
    theirs = [
        *made_runs("method=okddip", "trainer.precision=bf16", "trainer.device=cuda", last=[93.7]),
        *made_runs("method=okddip", "optimizer.lr=0.2", last=[90]),
        *made_runs("method=baseline", "trainer.epochs=13", last=[91]),
    ]
    text = (written(theirs, tmp_path / "theirs") / "table.txt").read_text()
    assert "measured with this program" in text.splitlines()[2]
    [beside] = [line for line in text.splitlines() if "93.50 ± 0.71 (n = 2)" in line]
    assert "93.70" in beside
    assert text.count("(n = 2)") == 1
    assert "cifar10.csv, 2001-09-09, version 0.2.0, cpu; device and precision may differ." in text

    again = (written(ours, tmp_path / "again") / "table.txt").read_text()
    assert "measured with this program" not in again  # runs do not stand beside themselves


@pytest.mark.parametrize("content", [None, "", "run_id,seed,last\n"])
def test_without_runs_of_ours_nothing_is_shown(
    tmp_path: Path, package_data: Path, content: str | None
) -> None:
    if content is not None:
        package_data.mkdir()
        (package_data / "runs.csv").write_text(content)
    folder = written(made_runs("method=okddip", last=[93, 94]), tmp_path / "report")
    assert "measured" not in (folder / "table.txt").read_text()


@pytest.mark.slow
def test_real_runs_stand_beside_those_of_another_seed(
    okddip: Callable[..., Answer], package_data: Path
) -> None:
    small = ("dataset=digits", "model=resnet8", "method=baseline", "trainer.epochs=1", "optimizer.lr=0.02")
    assert okddip("-m", *small, "trainer.limit_batches=1", "seed=0,1", "hydra.sweep.dir=sweep").code == 0
    package_data.mkdir()
    copy("sweep/report/runs.csv", package_data / "digits.csv")
    measured.known_runs.cache_clear()
    answer = okddip(*small, "trainer.limit_batches=1", "seed=2", "tracking.experiment=mine")
    assert answer.code == 0, answer.err
    answer = okddip("task=report", "tracking.experiment=mine")
    assert "measured with this program" in answer.out
    assert "(n = 2)" in answer.out
