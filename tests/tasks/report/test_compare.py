"""Differences to the baseline, and which settings become columns."""

import math

import numpy as np
import pandas as pd
import pytest
from report_store import made_runs, params_with
from scipy import stats

from okddip.tasks.report.columns import (
    ablation_name,
    changed_settings,
    named_changes,
    reference_settings,
    round_long_numbers,
    settings_column,
    short_names,
    varying_settings,
)
from okddip.tasks.report.compare import compare
from okddip.tasks.report.intervals import best_of, mean_difference
from okddip.tasks.report.published import option, published_for
from okddip.tasks.report.tables import difference_with_interval


def scores(values: list[float], seeds: list[int]) -> pd.Series:
    return pd.Series(values, index=seeds)


def test_runs_with_the_same_seed_are_paired_whatever_their_order() -> None:
    ours, theirs = scores([3.0, 1.0, 7.0], [2, 0, 1]), scores([0.5, 2.0, 2.0], [0, 1, 2])
    found = mean_difference(ours, theirs)
    expected = stats.ttest_rel([1.0, 7.0, 3.0], [0.5, 2.0, 2.0]).confidence_interval(0.95)
    assert found.pairs == 3
    assert found.mean == pytest.approx(6.5 / 3)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_only_the_seeds_that_both_have_are_paired() -> None:
    found = mean_difference(scores([1, 2, 90], [0, 1, 7]), scores([0, 0, 5], [0, 1, 8]))
    assert (found.mean, found.pairs) == (1.5, 2)


def test_without_two_common_seeds_the_interval_is_welchs() -> None:
    ours, theirs = [93.0, 94.0, 99.0], [92.0, 93.0]
    found = mean_difference(scores(ours, [0, 1, 2]), scores(theirs, [2, 3]))
    expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    assert found.pairs == 0
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_a_single_run_has_a_difference_and_no_interval() -> None:
    found = mean_difference(scores([2], [0]), scores([1], [0]))
    assert found.mean == 1
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_a_single_run_is_compared_with_the_run_of_its_seed() -> None:
    found = mean_difference(scores([94.0], [1]), scores([90.0, 93.5, 97.0], [0, 1, 2]))
    assert (found.mean, found.pairs) == (0.5, 1)
    assert difference_with_interval(found) == "+0.50 [fewer than 3 seeds] 1 pair"
    unpaired = mean_difference(scores([94.0], [7]), scores([90.0, 94.0], [0, 1]))
    assert difference_with_interval(unpaired) == "+2.00 [fewer than 3 seeds] unpaired"


def test_an_interval_takes_three_seeds_and_a_minus_is_no_hyphen() -> None:
    two = mean_difference(scores([94.0, 95.0], [0, 1]), scores([94.5, 96.5], [0, 1]))
    assert difference_with_interval(two) == "−1.00 [fewer than 3 seeds] 2 pairs"
    unpaired = mean_difference(scores([94.0, 95.0, 96.5], [0, 1, 2]), scores([94.5, 96.0], [3, 4]))
    assert difference_with_interval(unpaired) == "−0.08 [fewer than 3 seeds] unpaired"
    three = mean_difference(scores([94.0, 95.0, 93.0], [0, 1, 2]), scores([94.5, 96.5, 94.0], [0, 1, 2]))
    assert difference_with_interval(three) == "−1.00 [−2.24, +0.24] 3 pairs"
    equal = mean_difference(scores([1.0, 2.0, 3.0], [0, 1, 2]), scores([0.0, 1.0, 2.0], [0, 1, 2]))
    assert difference_with_interval(equal) == "+1.00 3 pairs"


def test_the_best_mean_and_those_within_its_interval_stand_out() -> None:
    best = scores([94.0, 95.0, 96.0], [0, 1, 2])  # 95 within 4.303 * 1 / sqrt(3) = 2.48
    near, far = best - 2.4, best - 2.5
    missing = scores([float("nan")] * 3, [0, 1, 2])
    assert best_of([far, best, near, missing]) == {1, 2}
    assert best_of([best[:2] - 0.1, best[:2]]) == set()  # two seeds have no interval
    assert best_of([best, missing]) == set()  # nothing to be better than


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (["0.012345678901234567", "0.1"], ["0.01235", "0.1"]),
        (["1.2345678901e-05", "null"], ["1.235e-05", "null"]),
        (["0.123456781", "0.123456782"], ["0.123456781", "0.123456782"]),
        (["12345678", "resnet110"], ["12345678", "resnet110"]),
    ],
)
def test_long_numbers_are_rounded_where_that_leaves_them_apart(values: list[str], shown: list[str]) -> None:
    assert list(round_long_numbers(pd.Series(values))) == shown


def test_equal_differences_are_no_certainty() -> None:
    found = mean_difference(scores([94.1, 95.2], [0, 1]), scores([95.77, 96.87], [0, 1]))
    assert found.mean == pytest.approx(-1.67)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_the_interval_covers_the_true_difference_in_95_of_100_experiments() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        theirs = random.normal(size=3)
        found = mean_difference(pd.Series(theirs + random.normal(0.7, 0.5, 3)), pd.Series(theirs))
        covered += found.low < 0.7 < found.high
    assert 0.935 < covered / 2000 < 0.965


def run(method: str, **changes: str) -> dict[str, str]:
    settings = {"method": method, "method.alpha": "1.0", "optimizer._target_": "sgd"}
    settings |= {"optimizer.lr": "0.1", "dataset.image_size": "16", "dataset.source.image_size": "16"}
    return settings | {key.replace("__", "."): value for key, value in changes.items()}


def columns(*settings: dict[str, str]) -> list[str]:
    return list(varying_settings(pd.DataFrame(settings).fillna("")).values())


def test_a_setting_that_varies_within_a_method_is_a_column_and_others_are_not() -> None:
    plain = run("baseline")
    del plain["method.alpha"]
    assert columns(plain, run("kd"), run("okddip", method__loss="kl")) == ["method"]
    assert columns(plain, run("okddip"), run("okddip", method__alpha="2.0")) == ["method", "alpha"]
    assert columns(plain, run("baseline", optimizer__lr="0.2")) == ["method", "lr"]


def test_peers_are_a_column_also_where_they_follow_the_method() -> None:
    found = columns(run("baseline", method__peers="1"), run("okddip", method__peers="4"))
    assert found == ["method", "peers"]


def test_a_setting_that_repeats_another_is_one_column() -> None:
    larger = run("okddip", dataset__image_size="32", dataset__source__image_size="32")
    assert columns(run("okddip"), larger) == ["method", "image_size"]


def test_a_setting_that_some_runs_have_not_is_a_column_where_nothing_else_tells_them_apart() -> None:
    assert columns(run("kd"), run("kd", optimizer__amsgrad="true")) == ["method", "amsgrad"]
    assert columns(run("kd"), run("kd", optimizer__amsgrad="true", optimizer__lr="1")) == ["method", "lr"]


def test_usual_is_what_the_option_file_has_or_else_what_most_runs_have() -> None:
    def ramp(*epochs: str) -> str:
        rows = pd.DataFrame({"method": "okddip", "method.ramp_epochs": epochs})
        return reference_settings(rows)["method.ramp_epochs"]

    assert ramp("0.27", "0.27", "80") == "80"
    assert ramp("0.27", "0.27", "0") == "0.27"
    assert ramp("0.27", "0") == "80"


def test_ablations_share_a_column_that_says_what_is_not_the_option_files() -> None:
    ours = pd.Series({"method": "okddip", "method.leader": "true", "method.attention": "false"})
    usual = option("method", "okddip")
    assert changed_settings(ours, usual, ["method.leader", "method.attention"]) == {
        "method.attention": "false"
    }
    assert ablation_name("okddip", {"method.attention": "false"}) == "no_attention"
    assert ablation_name("okddip", {"method.attention": "false", "method.leader": "false"}) == ""
    assert ablation_name("okddip", {}) == "full"
    # peers stand in a column of their own: else a count would leave the line of its ablation in the figure
    assert ablation_name("okddip", {"method.peers": "3"}) == "full"
    assert ablation_name("okddip", {"method.peers": "3", "method.structure": "network"}) == "networks"
    assert ablation_name("one", {}) == ""
    theirs = pd.Series({"method": "mine", "method.leader": "", "method.weight": "0.5"})
    assert changed_settings(theirs, {}, ["method.leader", "method.weight"]) == {"method.weight": "0.5"}
    shared = pd.Series({"method": "kd", "method.teacher_model": "null", "method.alpha": "1"})
    assert changed_settings(shared, option("method", "kd"), ["method.teacher_model", "method.alpha"]) == {}


def test_short_names_are_as_long_as_they_must_be() -> None:
    assert short_names(["optimizer.lr", "dataset.size", "model.size", "optimizer._target_"]) == {
        "optimizer.lr": "lr",
        "dataset.size": "dataset.size",
        "model.size": "model.size",
        "optimizer._target_": "optimizer",
    }


def test_an_ablation_crossed_with_another_setting_keeps_its_name() -> None:
    full = {"method": "okddip", "method.temperature": "3", "method.attention": "true"}
    changes = [
        {},
        {"method.attention": "false"},
        {"method.temperature": "2", "method.peers": "3"},
        {"method.temperature": "2", "method.attention": "false"},
        {"method.structure": "network", "method.attention": "false"},
        {"method.leader": "false", "method.attention": "false"},
    ]
    rows = pd.DataFrame([full | change for change in changes]).fillna("")
    merged = settings_column(rows, changes, ["method.temperature", "method.attention", "method.leader"])
    assert merged is not None
    column, named = merged
    assert column[:4] == ["full", "no_attention", "full temperature=2", "no_attention temperature=2"]
    assert column[4:] == [
        "no_attention",
        "attention=false leader=false",
    ]  # networks have a column of their own
    assert named == {"no_attention": "attention=false"}
    assert named_changes("okddip", {"method.structure": "network"}) == ("networks", {})


def test_a_single_setting_is_a_column_unless_its_values_are_ablations() -> None:
    def merged(key: str, *values: str) -> list[str] | None:
        usual = option("method", "okddip")[key]
        rows = pd.DataFrame({"method": "okddip", key: [usual, *values]})
        found = settings_column(rows, [{}, *({key: value} for value in values)], [key])
        return None if found is None else found[0]

    assert merged("method.attention", "false") == ["full", "no_attention"]
    assert merged("method.temperature", "2") is None
    assert merged("method.alpha", "0", "0.5") is None


@pytest.mark.parametrize("method", ["pcl", "kdcl"])
def test_what_an_option_file_sets_and_older_runs_had_not_tells_rows_apart(method: str) -> None:
    """A run says nothing of `views=shared`, which is what runs had before there was that setting."""
    default, shared, averaged = (
        made_runs(f"method={method}", *overrides, last=[90, 91, 92])
        for overrides in ((), ("method.views=shared",), ("method.ema_decay=0.5",))
    )
    assert "method.views" not in shared[0].data.params
    [comparison] = compare([*default, *shared, *averaged])
    assert [len(group.runs) for group in comparison.groups] == [3, 3, 3]
    assert comparison.reference == "default"
    [plain] = [group for group in comparison.groups if not group.differences]
    assert {run.info.run_id for run in plain.runs} == {run.info.run_id for run in default}
    [other] = [group for group in comparison.groups if group.settings["method.views"] == "shared"]
    assert "views=each" in [mark for figure in published_for(other.settings) for mark in figure.marks]


def test_runs_that_computed_otherwise_are_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """`trainer.precision=auto` is bf16 on CUDA; and each rank normalises its own share of a batch."""
    alone = made_runs("method=okddip", last=[90, 91])
    on_cuda = made_runs("method=okddip", last=[92, 93], tags={"device": "cuda:1"})
    monkeypatch.setenv("WORLD_SIZE", "4")
    params_with.cache_clear()
    four_ranks = made_runs("method=okddip", last=[94, 95])
    synchronised = made_runs("method=okddip", "trainer.sync_batch_norm=true", last=[96, 97])
    params_with.cache_clear()
    assert "ranks" not in synchronised[0].data.params

    [comparison] = compare([*alone, *on_cuda, *four_ranks])
    assert comparison.repeated == 0
    assert set(comparison.columns) >= {"precision", "ranks"}
    rows = {(group.values["precision"], group.values["ranks"]): group for group in comparison.groups}
    means = {key: group.scores["last"].mean() for key, group in rows.items()}
    assert means == {("fp32", ""): 90.5, ("bf16", ""): 92.5, ("fp32", "4"): 94.5}
