"""The task over a real store: tables, figures and what is refused."""

import socket
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from shutil import which

import matplotlib
import mlflow
import pandas as pd
import pytest
from conftest import Answer
from matplotlib.figure import Figure
from mlflow.tracking import MlflowClient
from report_store import EPOCHS, add_runs, made_runs

import okddip
from okddip.errors import ConfigError
from okddip.tasks.report import figures, make, runs, tables
from okddip.tasks.report.compare import compare
from okddip.tracking.store import open_store
from okddip.tracking.tracker import MLflow

Okddip = Callable[..., Answer]
KINDS = {
    *("headline-cifar10-resnet32", "headline-digits-resnet8"),
    *("accuracy-cifar10-resnet32", "diversity-cifar10-resnet32", "predictors-cifar10-resnet32"),
    *("peers-cifar10-resnet32", "attention-okddip_3_peers-cifar10-resnet32"),
    *("attention-okddip_4_peers-cifar10-resnet32", "accuracy-digits-resnet8"),
}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Runs on CIFAR-10 and on digits, with a sweep, a repetition and two unfinished runs among them."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    tracker = MLflow(uri, "compare")
    tracker.open()
    client = MlflowClient(uri)
    add = partial(add_runs, client, client.get_experiment_by_name("compare").experiment_id)
    parent = tracker.start("night", {}, {"sweep": "night", "method": "okddip"}, "", "okddip -m")
    tracker.finish("FINISHED")
    child = {"sweep": "night", "mlflow.parentRunId": parent}
    three = {"seeds": (0, 1, 2)}
    add("method=okddip", last=[10], seeds=[0])  # repeated below
    add("method=baseline", last=[92, 93, 94], **three)
    add("method=okddip", last=[93.5, 94, 95.5], tags=child, **three)
    add("method=okddip", "method.peers=3", last=[93, 93.2, 94.1], tags=child, **three)
    add("method=dml", last=[93, 94], seeds=[5, 6])
    add("method=okddip", last=[1], seeds=[3], status="FAILED", tags=child)
    add("method=okddip", last=[1], seeds=[4], status="RUNNING")
    add("method=baseline", "dataset=digits", "model=resnet8", last=[97], seeds=[0])
    return uri


@pytest.fixture(scope="module")
def folder(uri: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on all of them."""
    client = open_store(uri)
    return make(client, runs.find_runs(client, uri, "compare"), tmp_path_factory.mktemp("report"))


@pytest.fixture
def drawn(uri: str) -> Iterator[dict[str, Figure]]:
    """The figures of CIFAR-10, to look into."""
    client = open_store(uri)
    chosen, _ = runs.finished_runs(runs.find_runs(client, uri, "compare"))
    cifar10, _ = compare(chosen)

    def history(run: mlflow.entities.Run, metric: str) -> pd.Series:
        points = client.get_metric_history(run.info.run_id, metric)
        return pd.Series({point.step + 1: point.value for point in points}, dtype=float)

    with matplotlib.rc_context():
        yield figures.draw(cifar10, "resnet32", history)


def test_runs_in_python_are_rows_with_settings_and_metrics_as_numbers(uri: str) -> None:
    everything = okddip.runs(uri=uri, experiment="compare")
    assert everything["status"].value_counts().to_dict() == {"FINISHED": 13, "FAILED": 1, "RUNNING": 1}
    night = okddip.runs("night", "tags.method = 'okddip'", uri=uri, experiment="compare")
    assert set(night["sweep"]) == {"night"}
    means = night.groupby("method.peers")["final/top1"].mean()
    assert means.round(2).to_dict() == {3: 93.43, 4: 94.33}
    row = everything[everything["dataset"] == "digits"].iloc[0]
    assert (row["seed"], row["method.peers"], row["trainer.channels_last"]) == (0, 1, True)
    assert (row["final/top1"], row["best/top1"]) == (97, 97.5)
    repeated = everything[everything["repeated"]]
    assert list(repeated["final/top1"]) == [10]
    assert not everything["teacher"].any()
    by_epoch = okddip.history(str(row.name), "test/top1", uri=uri)
    assert list(by_epoch.index) == list(range(1, EPOCHS + 1))
    assert by_epoch.iloc[-1] == 97
    with pytest.raises(ConfigError, match=r"There is no training run in .*, sweep=day"):
        okddip.runs("day", uri=uri, experiment="compare")


def test_a_row_a_group_with_mean_deviation_and_interval(folder: Path) -> None:
    lines = (folder / "table.txt").read_text().splitlines()
    assert lines[0].startswith("Test top-1 (%) on cifar10, resnet32, 12 epochs")
    assert lines[2].split() == [
        *("method", "peers", "structure", "predictor", "n", "last", "epoch", "best", "epoch", "ensemble"),
        *("last", "−", "baseline", "training", "published"),
    ]
    methods = [line.split()[:2] for line in lines[4:8]]
    assert methods == [["baseline", "1"], ["dml", "4"], ["okddip", "3"], ["okddip", "4"]]
    baseline, dml, _, okddip = lines[4:8]
    assert "3  93.00 ± 1.00  93.50 ± 1.00" in baseline
    assert "[" not in baseline
    # differences 1.5, 1.0, 1.5: mean 1.333, standard error 0.1667, t(0.975, 2) = 4.3027
    assert "3  94.33 ± 1.04  94.83 ± 1.04  95.33 ± 1.04  +1.33 [+0.62, +2.05] 3 pairs" in okddip
    # no seed in common; the interval, [-1.99, +2.99], is that of two seeds on one side
    assert "2  93.50 ± 0.71  94.00 ± 0.71  94.50 ± 0.71  +0.50 [fewer than 3 seeds] unpaired" in dml
    predictors = [line.split()[3] for line in (baseline, okddip)]
    assert predictors == ["student", "leader"]
    assert "branch     leader" in okddip
    assert "network    mean peer" in dml


@pytest.mark.slow
@pytest.mark.parametrize("ramp", ["80", "0.27"])
def test_ablations_are_named_and_compared_with_the_whole_method(tmp_path: Path, ramp: str) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("ablations")
    two = {"seeds": (0, 1)}
    okddip = ("method=okddip", f"methods.ramp_epochs={ramp}")
    for name, last in (
        ("full", [94, 95]),
        ("no_attention", [93, 94.2]),
        ("networks", [96, 96]),
        ("no_ramp", [90, 90]),
    ):
        add_runs(client, experiment, *okddip, f"ablation={name}", last=last, **two)
    twice = ("method.attention=false", "method.leader=false")
    add_runs(client, experiment, *okddip, *twice, last=[91, 91], **two)
    folder = make(client, runs.find_runs(client, uri, "ablations"), tmp_path / "report")
    text = (folder / "table.txt").read_text()
    rows = {line.split("leader   ")[0].split()[-1]: line for line in text.splitlines()[4:9]}
    assert rows.keys() == {"full", "no_attention", "networks", "no_ramp", "attention=false"}
    assert "last − default" in text
    assert "pairs" not in rows["full"]
    assert "−0.90 [" in rows["no_attention"]
    assert "+1.50 [" in rows["networks"]
    assert "leader=false attention=false" in rows["attention=false"]
    assert "last − default: difference to the same method with the settings of its option file" in text
    assert "no_attention: attention=false" in text

    add_runs(client, experiment, *okddip, "method.peers=3", last=[93, 93], **two)
    add_runs(client, experiment, *okddip, "dataset.validation=0.1", last=[92, 92], **two)
    [comparison] = compare(runs.finished_runs(runs.find_runs(client, uri, "ablations"))[0])
    drawn = figures.draw(comparison, "resnet32", lambda run, metric: pd.Series([1.0, 1.0], [1, 2]))
    [line, *_] = drawn["peers"].axes[0].lines
    assert list(line.get_xdata()) == [3, 4]
    assert "where validation is 0, chosen on the test set itself" in tables.footer(comparison)[0]


@pytest.mark.slow
def test_image_folders_are_told_apart_by_their_images_and_not_by_their_place(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("folders")

    def add(root: str, digest: str, *overrides: str, seed: int = 0) -> None:
        add_runs(
            *(client, experiment, "dataset=image_folder", f"dataset.root={root}", *overrides),
            last=[90],
            seeds=[seed],
            digest=digest,
        )

    add("photos", "aaaaaaaa")
    add("/data/photos", "aaaaaaaa", seed=1)  # the same, moved
    add("photos", "bbbbbbbb")  # others, in the place of the first
    add("drawings", "cccccccc")
    add("drawings", "dddddddd", "dataset.image_size=16")  # the same, scaled
    names = {
        name: len(members)
        for name, members in runs.group_by_dataset(
            runs.finished_runs(runs.find_runs(client, uri, "folders"))[0]
        ).items()
    }
    assert names == {
        "image_folder photos": 2,
        "image_folder photos (bbbbbb)": 1,
        "image_folder drawings": 2,
    }


@pytest.mark.slow
def test_teachers_are_compared_by_what_they_are_and_not_by_where(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("teachers")

    def add(place: str, teacher: str, its_seed: int, seed: int, *more: str, epoch: int = 9) -> None:
        tags = {"teacher": teacher, "teacher.seed": str(its_seed), "teacher.epoch": str(epoch)}
        add_runs(
            *(client, experiment, "method=kd", f"method.teacher={place}", *more),
            last=[90],
            seeds=[seed],
            tags=tags if teacher else {},
        )

    def rows(column: str) -> dict[str, str]:
        [comparison] = compare(runs.finished_runs(runs.find_runs(client, uri, "teachers"))[0])
        return {
            group.values.get(column, ""): " ".join(map(str, group.scores.index))
            for group in comparison.groups
        }

    add("a0", "resnet8-111111", 0, 0)
    add("a1/last.pt", "resnet8-111111", 1, 1)
    add("moved/a0", "resnet8-111111", 0, 0)  # the same in another place
    add("auto", "resnet8-111111", 2, 2, "method.teacher_model=resnet8")
    assert rows("teacher") == {"": "0 1 2"}
    add("b", "resnet20-222222", 0, 0)
    assert rows("teacher_model") == {"resnet8": "0 1 2", "resnet20": "0"}
    add("c", "resnet8-333333", 0, 0)  # of other settings
    assert rows("teacher") == {"resnet8-111111": "0 1 2", "resnet20-222222": "0", "resnet8-333333": "0"}
    add("a1", "resnet8-111111", 1, 0)  # a second of its kind for one student
    kinds = rows("teacher")
    assert (kinds["resnet8-111111"], kinds["resnet8-111111 of seed 1"]) == ("0 1 2", "0")


def test_published_figures_are_marked_where_they_differ_and_have_their_source(folder: Path) -> None:
    text = (folder / "table.txt").read_text()
    _, dml, three, four = text.splitlines()[4:8]
    assert "94.17 ± 0.15 [pcl]" in three
    assert "94.17 ± 0.15* [pcl; 3 peers]" in four
    assert "93.94 ± 0.07* [pcl; 3 peers; structure not stated]" in dml
    assert "[pcl] Top-1 accuracy (%), 3 peers, as tabulated in PCL (Wu and Gong, AAAI 2021)" in text


def test_left_out_runs_are_counted_and_data_sets_kept_apart(folder: Path) -> None:
    text = (folder / "table.txt").read_text()
    assert "Unfinished runs, left out: 2 (1 FAILED, 1 RUNNING)." in text
    assert "Repeated runs, left out: 1;" in text
    assert text.count("Test top-1 (%) on ") == 2
    assert "cannot be compared: a table for each of cifar10, digits." in text


def test_runs_of_cut_epochs_say_so_and_their_published_figures_are_marked(tmp_path: Path) -> None:
    limited = made_runs("method=okddip", "method.peers=4", "trainer.limit_batches=2", last=[10.0])
    tables.write_tables(compare(limited), "", tmp_path)
    text = (tmp_path / "table.txt").read_text()
    assert "Where trainer.limit_batches is set, accuracies are of the first test images at most" in text
    assert "whole epochs, all test images" in text


def test_markdown_latex_and_csv_hold_the_same_table(folder: Path) -> None:
    assert "| okddip | 4 | branch | leader | 3 | **94.33 ± 1.04** |" in (folder / "table.md").read_text()
    latex = (folder / "table.tex").read_text()
    assert r"okddip & 4 & branch & leader & 3 & \textbf{\boldmath 94.33 $\pm$ 1.04} & " in latex
    assert r" & $+$1.33 [$+$0.62" in latex
    assert r"last $-$ baseline" in latex
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == 2
    assert (
        r"94.17 $\pm$ 0.15* (" in latex
    )  # the source of a published figure is a footnote where there is no room
    assert "[pcl; 3 peers]" in latex
    assert latex.index("Unfinished runs, left out: 2") > latex.index(r"\begin{tabular}")  # and not a comment
    table = pd.read_csv(folder / "table.csv").set_index(["dataset", "method", "peers"])
    assert table.loc[("cifar10", "okddip", 4), "last_mean"] == pytest.approx((93.5 + 94 + 95.5) / 3)
    assert table.loc[("cifar10", "okddip", 4), "last_difference_low"] == pytest.approx(0.6162, abs=1e-4)
    assert table.loc[("cifar10", "okddip", 4), "best_difference_pairs"] == 3
    assert table.loc[("cifar10", "okddip", 4), "seeds"] == "0 1 2"
    assert table.loc[("digits", "baseline", 1), "n"] == 1
    assert table.loc[("cifar10", "okddip", 4), "published_sources"].startswith("[pcl] Top-1 accuracy")


@pytest.mark.skipif(which("pdflatex") is None, reason="no pdflatex here")
def test_a_latex_table_with_published_figures_fits_the_page(folder: Path, tmp_path: Path) -> None:
    document = [r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}"]
    document += [(folder / "table.tex").read_text(), r"\end{document}"]
    (tmp_path / "table.tex").write_text("\n".join(document))
    said = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stdout
    assert "Overfull" not in said.stdout


def test_figures_are_written_as_png_and_pdf(folder: Path) -> None:
    assert {path.stem for path in folder.glob("*.png")} == KINDS
    assert {path.stem for path in folder.glob("*.pdf")} == KINDS
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))
    assert all(path.read_bytes().startswith(b"%PDF") for path in folder.glob("*.pdf"))


def test_accuracy_by_epoch_has_a_line_a_group_and_a_band_from_three_seeds_on(
    drawn: dict[str, Figure],
) -> None:
    whole, end = drawn["accuracy"].axes
    assert whole.get_legend_handles_labels()[1] == [
        *("Baseline (student)", "DML (mean peer)", "OKDDip, 3 peers (leader)", "OKDDip, 4 peers (leader)")
    ]
    assert len(whole.collections) == 3  # DML has two seeds: a thin line each
    lines = [line for line in whole.lines if not str(line.get_label()).startswith("_")]
    assert len(whole.lines) == len(lines) + 2
    assert whole.get_ylabel() == "Test top-1 (%)"
    assert list(whole.lines[0].get_xdata()) == list(range(1, EPOCHS + 1))
    assert whole.lines[0].get_ydata()[-1] == pytest.approx(93)
    assert list(end.lines[0].get_xdata()) == [9, 10, 11, 12]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == 4
    diversity = drawn["diversity"].axes[0]
    assert diversity.get_yscale() == "log"
    names = diversity.get_legend_handles_labels()[1]
    assert names == ["DML", "OKDDip, 3 peers", "OKDDip, 4 peers"]  # the baseline has no peers


def test_peer_counts_are_set_against_accuracy_and_step_time(drawn: dict[str, Figure]) -> None:
    accuracy, step_time = drawn["peers"].axes
    assert step_time.get_ylabel() == "Training step on cpu (ms)"
    [line, *_] = step_time.lines
    assert list(line.get_xdata()) == [3, 4]
    assert list(line.get_ydata()) == pytest.approx([30, 40])  # batches of 128 at 12,800 / peers images/s
    assert accuracy.lines[0].get_ydata()[1] == pytest.approx(94.3333, abs=1e-4)


def test_leader_mean_and_ensemble_stand_side_by_side(drawn: dict[str, Figure]) -> None:
    [axes] = drawn["predictors"].axes
    [legend] = drawn["predictors"].legends
    named = [text.get_text() for text in legend.get_texts()]
    assert named == ["group leader", "mean peer", "ensemble of peers"]
    fills = {line.get_fillstyle() for line in axes.lines if line.get_marker() == "o"}
    assert fills == {"full", "left", "none"}  # of OKDDip, whose marker it is
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "DML",
        "OKDDip, 3 peers",
        "OKDDip, 4 peers",
    ]


def test_attention_has_a_matrix_for_each_seed_and_chosen_epoch(drawn: dict[str, Figure]) -> None:
    matrices = [axes for axes in drawn["attention-okddip, 4 peers"].axes if axes.images]
    assert len(matrices) == 3 * 4
    assert matrices[0].images[0].get_array().tolist() == [
        [0.5, 0.25, 0.25],
        [0.25, 0.5, 0.25],
        [0.25, 0.25, 0.5],
    ]
    assert [axes.get_title() for axes in matrices[:4]] == ["epoch 1", "epoch 5", "epoch 8", "epoch 12"]


def test_drawing_leaves_the_settings_of_matplotlib_as_they_were(uri: str, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    client = open_store(uri)
    make(client, runs.find_runs(client, uri, "compare", where="tags.method = 'dml'"), tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_a_parent_run_gets_the_report_as_artifacts(uri: str, tmp_path: Path) -> None:
    client = MlflowClient(uri)
    found = runs.find_runs(client, uri, "compare", sweep="night")
    [parent] = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = runs.find_runs(client, uri, "compare", sweep=parent.info.run_id)
    assert {run.info.run_id for run in children} == {run.info.run_id for run in found if run is not parent}
    make(client, found, tmp_path / "report", parent.info.run_id)
    logged = {Path(file.path).name for file in client.list_artifacts(parent.info.run_id, "report")}
    assert {"table.md", "table.csv", "accuracy-cifar10-resnet32.png"} <= logged
    best = client.get_run(parent.info.run_id).data
    assert best.tags["best.setting"] == "okddip, 4 peers"
    assert best.metrics == {
        "final/top1": pytest.approx(94.3333, abs=1e-4),
        "best/top1": pytest.approx(94.8333, abs=1e-4),
    }
    assert "left out: 1 (1 FAILED)" in (tmp_path / "report" / "table.txt").read_text()


@pytest.mark.slow
def test_the_description_of_a_parent_run_has_the_report_below_what_people_wrote(
    uri: str, tmp_path: Path
) -> None:
    client = MlflowClient(uri)
    found = runs.find_runs(client, uri, "compare", sweep="night")
    [parent] = [run.info.run_id for run in found if "mlflow.parentRunId" not in run.data.tags]
    client.set_tag(parent, "mlflow.note.content", "The night shift.\n\n### Report\n\nold")
    for name in ("first", "second"):
        make(client, found, tmp_path / name, parent)
    note = client.get_run(parent).data.tags["mlflow.note.content"]
    assert note.startswith("The night shift.\n\n### Report\n\n**Test top-1 (%) on cifar10")
    assert note.count("| okddip | 4 |") == 1
    assert f"get-artifact?path=report/accuracy-cifar10-resnet32.png&run_uuid={parent}" in note


def test_evaluations_and_benchmarks_are_no_unfinished_runs(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    MLflow(uri, "other").open()
    client = MlflowClient(uri)
    experiment_id = client.get_experiment_by_name("other").experiment_id
    add_runs(client, experiment_id, "method=okddip", last=[93], seeds=[0])
    for tags in ({"kind": "evaluation"}, {"task": "benchmark"}):
        add_runs(client, experiment_id, "method=okddip", last=[1], seeds=[0], status="FAILED", tags=tags)
    chosen, left_out = runs.finished_runs(runs.find_runs(client, uri, "other"))
    assert len(chosen) == 1
    assert left_out == ""


def test_a_filter_asks_for_the_settings_that_a_run_has_now(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    MLflow(uri, "longer").open()
    client = MlflowClient(uri)
    experiment_id = client.get_experiment_by_name("longer").experiment_id
    longer = {"resumed.trainer.epochs": "20"}
    add_runs(client, experiment_id, "method=okddip", last=[93], seeds=[0], tags=longer)
    add_runs(client, experiment_id, "method=okddip", last=[92], seeds=[1])

    def seeds(where: str) -> list[str]:
        return sorted(runs.seed(run) for run in runs.find_runs(client, uri, "longer", where=where))

    assert seeds("params.`trainer.epochs` = '20'") == ["0"]
    assert seeds(f"params.`trainer.epochs` = '{EPOCHS}'") == ["1"]
    assert seeds("params.`trainer.epochs` LIKE '%0' and metrics.`final/top1` > 92.5") == ["0"]
    assert seeds("attributes.status = 'FINISHED' and tags.method = 'okddip'") == ["0", "1"]


def test_the_task_prints_the_table_of_what_a_filter_chooses(okddip: Okddip, uri: str) -> None:
    store = (f"tracking.uri={uri}", "tracking.experiment=compare", "hydra.run.dir=run")
    chosen = r'report.where="params.`method.peers` = \"3\""'
    answer = okddip("task=report", *store, chosen, "report.out=here")
    assert answer.code == 0, answer.err
    assert "okddip  leader     3  93.43 ± 0.59" in answer.out
    assert "cifar10, resnet32, 3 peers, 12 epochs" in answer.out
    assert Path("here/table.tex").exists()


@pytest.mark.parametrize(
    "where",
    [
        "tags.method = 'dml'",
        "tags.method='dml' and params.`trainer.epochs` = \"12\"",
        "tags.method LIKE 'd%'",
        "metrics.`final/top1` > 92.9 AND params.method='dml'",
    ],
)
def test_a_filter_may_be_typed_as_mlflow_reads_it(okddip: Okddip, uri: str, where: str) -> None:
    store = (f"tracking.uri={uri}", "tracking.experiment=compare", "hydra.run.dir=run")
    answer = okddip("task=report", *store, f"report.where={where}")
    assert answer.code == 0, answer.err
    assert "93.50 ± 0.71" in answer.out


def test_numbers_are_rounded_for_readers_and_not_in_the_csv_file(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("drawn")
    for rate in ("0.0123456789012", "0.1"):
        add_runs(client, experiment, "method=one", f"optimizer.lr={rate}", last=[90], seeds=[0])
    tables.write_tables(compare(runs.finished_runs(runs.find_runs(client, uri, "drawn"))[0]), "", tmp_path)
    assert "one     0.01235  mean peer  1" in (tmp_path / "table.txt").read_text()
    assert "0.0123456789012" in (tmp_path / "table.csv").read_text()


def test_files_of_figures_have_short_names_of_their_own(tmp_path: Path) -> None:
    taken: set[str] = set()
    names = [figures.file_name(words, taken) for words in ("a b", "a/b", "ü" * 300, f"{'ü' * 300}b")]
    assert names[0] == "a_b"
    assert len(set(names)) == 4
    assert max(len(name.encode()) for name in names) < 200


@pytest.mark.slow
def test_a_report_is_whole_however_long_the_path_of_the_images_is(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("deep")
    root = "/".join(["a_folder_within_a_folder"] * 20)
    add_runs(client, experiment, "dataset=image_folder", f"dataset.root={root}", last=[90], seeds=[0])
    folder = make(client, runs.find_runs(client, uri, "deep"), tmp_path / "report")
    assert len(list(folder.glob("accuracy-image_folder*.png"))) == 1


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["report.sweep=nope"], ["report.sweep=nope: 0 of the experiment's", "tracking.experiment=compare"]),
        (["report.where=\"tags.method = 'one'\""], ["tags.method = 'one'", "0 of the experiment's 16 runs"]),
        (
            ["report.where=\"attributes.status = 'FAILED'\""],
            ["1 of the experiment's 16 runs match. Unfinished runs, left out: 1 (1 FAILED)."],
        ),
        (['report.where="epochs three"'], ["report.where=epochs three: Invalid", "params.`method.peers`"]),
        (["tracking.experiment=nope"], ["there is no such experiment. There are Default, compare."]),
        (["tracking.uri=sqlite:///no.db"], ["tracking.uri=sqlite:///no.db: there is no such store"]),
        (["~tracking.uri"], ["reads runs from an MLflow store"]),
        (["report.run=nope"], ["report.run=nope: Run with id=nope not found"]),
        (["report.out=/dev/null/here"], ["report.out=/dev/null/here: the report cannot be written"]),
    ],
)
def test_bad_input_says_what_was_searched(
    okddip: Okddip, uri: str, overrides: list[str], messages: list[str]
) -> None:
    defaults = [f"tracking.uri={uri}", "tracking.experiment=compare"]
    given = {override.split("=")[0].lstrip("~") for override in overrides}
    defaults = [override for override in defaults if override.split("=")[0] not in given]
    answer = okddip("task=report", *defaults, *overrides)
    assert answer.code == 1
    for message in messages:
        assert message in answer.err
    assert "Traceback" not in answer.err
    assert not Path("no.db").exists()


def test_a_server_that_does_not_answer_is_named(okddip: Okddip) -> None:
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{bound.getsockname()[1]}"
        answer = okddip("task=report", f"tracking.uri={address}")
    assert answer.code == 1
    assert f"tracking.uri={address}" in answer.err
