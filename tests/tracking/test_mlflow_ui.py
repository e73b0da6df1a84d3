"""MLflow's own pages on a real sweep, as a person sees them in a browser."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("Chromium is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
SWEEP = (
    *("-m", "dataset=digits", "model=resnet8", "method=dml,okddip", "seed=0,1"),
    *("trainer.epochs=2", "trainer.limit_batches=2"),
)
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a sweep was run."""
    folder = tmp_path_factory.mktemp("sweep")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "okddip.main", *SWEEP]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("okddip")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Of `mlflow ui` on the store of the sweep."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", "sqlite:///mlflow.db"]
    command += ["--port", str(port), "--workers", "1"]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    address = f"http://127.0.0.1:{port}"
    with (
        (folder / "ui.log").open("w") as log,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log) as server,
    ):
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "ui.log").read_text()
                time.sleep(0.5)
        yield address
        server.terminate()


@pytest.fixture
def page(tmp_path: Path) -> Iterator["sync_api.Page"]:
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=CHROMIUM,
            args=FLAGS,
            viewport={"width": 1900, "height": 1000},
        )
        context.set_default_timeout(PATIENCE_MS)
        yield context.pages[0]
        context.close()


def test_the_table_of_runs_tells_them_apart(page: "sync_api.Page", address: str, runs: list[Run]) -> None:
    page.goto(f"{address}/#/experiments/1/runs?workflowType=machine_learning")
    parent = next(run for run in runs if run.data.tags.get("kind") == "sweep")
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name=parent.info.run_name, exact=True))
    row.locator("button").first.click()  # its children unfold
    jobs = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    for job in jobs:
        page.get_by_role("link", name=job.info.run_name, exact=True).wait_for()
    # what a narrow column shows of a name says which run it is
    assert len({job.info.run_name[:14] for job in jobs}) == len(jobs) == 4
    assert page.get_by_text("digits (").count() >= 1  # the data set's own column

    page.get_by_role("button", name="Columns").click()
    # the description of the experiment names it too
    page.get_by_test_id("column-selector-tree").get_by_text("final/top1", exact=True).click()
    page.keyboard.press("Escape")
    page.get_by_role("columnheader", name="final/top1").first.wait_for()
    accuracy = f"{jobs[0].data.metrics['final/top1']:.2f}"[:4]
    page.get_by_role("gridcell").filter(has_text=accuracy).first.wait_for()


def test_the_chart_view_comes_up_with_accuracy_first(page: "sync_api.Page", address: str) -> None:
    page.goto(f"{address}/#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART")
    page.get_by_text("final/top1", exact=True).first.wait_for()
    page.get_by_text("whose runs unfold below it", exact=False).first.wait_for()  # how to read it
    charts: list[str] = []
    for _ in range(PATIENCE_MS // 250):  # they are drawn one after the other
        names = page.get_by_text(re.compile(r"^(best|final|test|train)/")).all_inner_texts()
        charts = names[names.index("test/peer0/top1") + 1 :]  # the description ends with it
        if any(name.startswith("train/") for name in charts):
            break
        page.wait_for_timeout(250)
    assert charts[:2] == ["best/top1", "final/top1"]
    assert not [name for name in charts if "epoch" in name or "attention" in name]


def test_the_compare_page_opens_on_methods_against_accuracy(
    page: "sync_api.Page", address: str, runs: list[Run]
) -> None:
    jobs = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    chosen = urllib.parse.urlencode(
        {"runs": json.dumps([run.info.run_id for run in jobs]), "experiments": json.dumps(["1"])},
        quote_via=urllib.parse.quote,
    )
    page.goto(f"{address}/#/compare-runs?{chosen}")
    page.get_by_text("Comparing 4 Runs").wait_for()
    plot = page.locator(".js-plotly-plot").first
    plot.get_by_text("method", exact=True).first.wait_for()
    plot.get_by_text("test/top1", exact=True).first.wait_for()
    for job in jobs:
        page.get_by_text(job.info.run_name, exact=True).first.wait_for()


def test_a_sweep_shows_its_table_and_its_figures(
    page: "sync_api.Page", address: str, runs: list[Run]
) -> None:
    parent = next(run for run in runs if run.data.tags.get("kind") == "sweep")
    page.goto(f"{address}/#/experiments/1/runs/{parent.info.run_id}?workflowType=machine_learning")
    page.get_by_role("cell", name="dml", exact=True).wait_for()
    figure = page.locator("img[src*='get-artifact']").first
    figure.wait_for()
    page.wait_for_function("image => image.naturalWidth > 0", arg=figure.element_handle())
