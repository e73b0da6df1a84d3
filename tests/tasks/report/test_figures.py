"""What figures show, of runs that no store holds."""

from collections.abc import Sequence

import matplotlib
import pandas as pd
import pytest
from matplotlib.figure import Figure
from mlflow.entities import Run
from report_store import EPOCHS, made_history, made_runs

from okddip.tasks.report.compare import compare
from okddip.tasks.report.curves import minutes_by_epoch, squashing
from okddip.tasks.report.figures import draw
from okddip.tasks.report.styles import METHODS, look, series_of

THREE = (93.0, 94.0, 95.5)


@pytest.fixture(autouse=True)
def own_settings() -> None:
    matplotlib.rcdefaults()


def figures_of(chosen: Sequence[Run]) -> dict[str, Figure]:
    [comparison] = compare(chosen)
    return draw(comparison, "resnet32", made_history)


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))  # type: ignore[attr-defined]


def test_the_headline_has_a_row_a_setting_with_runs_mean_interval_ensemble_and_cost() -> None:
    cost = {"parameters.trained": "1530872", "parameters.kept": "466906", "flops.kept": "138249472"}
    chosen = [
        *made_runs("method=baseline", last=[92, 93, 94]),
        *made_runs("method=okddip", last=THREE, tags={"predictor": "leader", **cost}),
        *made_runs("method=cl_ilr", last=[93.0, 93.5]),
    ]
    figure = figures_of(chosen)["headline"]
    [axes] = figure.axes
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["Baseline (student)", "CL-ILR (mean peer)", "OKDDip (leader)"]
    dots = [line for line in axes.lines if line.get_marker() == "."]
    assert [list(line.get_xdata()) for line in dots] == [[92, 93, 94], [93.0, 93.5], list(THREE)]
    assert len(axes.containers) == 3
    intervals = [bar for bar in axes.containers if bar.has_xerr]  # type: ignore[attr-defined]
    assert len(intervals) == 2  # two seeds of CL-ILR have none
    ensembles = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D"]
    assert ensembles == pytest.approx([94.25, 95.1667], abs=1e-4)
    [line] = [line for line in axes.lines if line.get_label() == "baseline"]
    assert list(line.get_xdata()) == [93, 93]
    assert "1.53 M, 3,200 images/s\n467 k, 138 MFLOPs" in texts(figure)


def test_a_method_has_one_colour_and_marker_in_every_report_and_no_other_has_both() -> None:
    alone = compare(made_runs("method=okddip", last=THREE))
    together = compare([*made_runs("method=dml", last=THREE), *made_runs("method=okddip", last=THREE)])
    first, second = (series_of(comparison, "resnet32")[-1].style for [comparison] in (alone, together))
    assert first == second
    looks = [look(method) for method in METHODS]
    assert len(set(looks)) == len(looks)
    assert look("mine") == look("mine") not in looks


def test_settings_of_a_method_differ_in_shade_and_line() -> None:
    chosen = [run for peers in (3, 4, 5) for run in made_runs(f"method.peers={peers}", last=THREE)]
    [comparison] = compare(chosen)
    styles = [each.style for each in series_of(comparison, "resnet32")]
    assert len({style["marker"] for style in styles}) == 1
    assert len({style["color"] for style in styles}) == len({style["linestyle"] for style in styles}) == 3


def test_many_settings_have_a_panel_each() -> None:
    rates = [f"0.{digit}" for digit in range(1, 6)]
    chosen = [run for rate in rates for run in made_runs(f"optimizer.lr={rate}", last=[93])]
    drawn = figures_of(chosen)
    for kind in ("accuracy", "diversity", "time"):
        panels = [axes for axes in drawn[kind].axes if axes.axison]
        assert len(panels) == 5
        assert panels[3].get_title() == f"OKDDip, lr 0.4{' (leader)' * (kind != 'diversity')}"
    assert len(drawn["headline"].axes[0].get_yticklabels()) == 5


def test_without_attention_there_is_no_figure_of_it() -> None:
    assert "attention-okddip" in figures_of(made_runs("method=okddip", last=THREE))
    without = figures_of(made_runs("method=okddip", "method.attention=false", last=THREE))
    assert not [kind for kind in without if kind.startswith("attention")]


def test_queries_ask_and_keys_answer() -> None:
    shown = texts(figures_of(made_runs("method=okddip", last=THREE))["attention-okddip"])
    assert "query: auxiliary peer that asks" in shown
    assert "key: auxiliary peer that is asked" in shown


def test_a_failed_setting_is_named_and_does_not_squash_the_others() -> None:
    chosen = [
        *made_runs("method=baseline", last=[92, 93, 94]),
        *made_runs("method=okddip", last=THREE),
        *made_runs("method=dml", last=[10, 10, 11]),
    ]
    drawn = figures_of(chosen)
    end = drawn["accuracy"].axes[1]
    assert end.get_ylim()[0] > 60
    assert "below: DML (mean peer) 10.33" in texts(drawn["accuracy"])
    assert drawn["headline"].axes[0].get_xlim()[0] > 80
    assert "◂ 10.33" in texts(drawn["headline"])


@pytest.mark.parametrize(
    ("ranges", "left_out"),
    [
        ([(90, 91), (91, 92), (10, 10)], {2}),
        ([(90, 91), (91, 92), (88, 90)], set()),
        ([(90, 91), (10, 10)], set()),  # of two neither is the rule
        ([(90, 91), (91, 92), (89, 92), (10, 11), (40, 41)], {3, 4}),
        ([(90, 90), (90, 90), (10, 10)], set()),  # nothing to tell apart
        ([(10, 11), (11, 12), (90, 91)], set()),  # the best stays
    ],
)
def test_what_squashes_the_others_is_left_out_from_below(
    ranges: list[tuple[float, float]], left_out: set[int]
) -> None:
    assert squashing(ranges) == left_out


def test_training_time_counts_the_images_of_an_epoch() -> None:
    [run] = made_runs("method=okddip", last=[90])
    spent = minutes_by_epoch(run, made_history)
    assert spent is not None
    assert spent.iloc[-1] == pytest.approx(EPOCHS * 50_000 / 3_200 / 60)
    [limited] = made_runs("method=okddip", "trainer.limit_batches=2", last=[90])
    spent = minutes_by_epoch(limited, made_history)
    assert spent is not None
    assert spent.iloc[0] == pytest.approx(2 * 128 / 3_200 / 60)
    run.inputs.dataset_inputs.clear()
    assert minutes_by_epoch(run, made_history) is None


def test_accuracy_is_drawn_against_the_time_that_training_took() -> None:
    chosen = [*made_runs("method=baseline", last=[92]), *made_runs("method=okddip", last=[93])]
    [axes] = figures_of(chosen)["time"].axes
    assert axes.get_xlabel() == "Minutes of training on cpu, without evaluations"
    baseline, okddip = (line for line in axes.lines if not str(line.get_label()).startswith("_"))
    assert okddip.get_xdata()[-1] == pytest.approx(4 * baseline.get_xdata()[-1])  # a quarter of the images/s


def test_the_baseline_is_a_line_beside_numbers_of_peers() -> None:
    chosen = [run for peers in (3, 4) for run in made_runs(f"method.peers={peers}", last=THREE)]
    drawn = figures_of([*chosen, *made_runs("method=baseline", last=[92, 93, 94])])["peers"]
    accuracy, time = drawn.axes
    assert list(accuracy.lines[-1].get_ydata()) == [93, 93]
    assert list(time.lines[-1].get_ydata()) == pytest.approx([10, 10])


def test_runs_that_logged_nothing_by_epoch_have_figures_of_their_results_alone() -> None:
    [comparison] = compare(made_runs("method=baseline", last=[92, 93]))
    drawn = draw(comparison, "resnet32", lambda run, metric: pd.Series(dtype=float))
    assert drawn.keys() == {"headline"}
