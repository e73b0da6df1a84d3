"""Published figures: all that are quoted are in the package's data, each with its source."""

import pytest

from okddip.tasks.report import published

MODELS = ("resnet32", "resnet110", "vgg16", "densenet40_12", "wrn20_8")
TABLE_OF_PCL = {
    "cifar100": {
        "kdcl": "73.76 78.28 75.67 72.52 79.37",
        "pcl": "74.14 79.98 76.89 73.09 80.51",
        "ffl": "72.18 77.22 70.87 71.25 78.22",
        "okddip": "73.25 78.54 74.68 71.23 78.83",
    },
    "cifar10": {
        "kdcl": "94.01 95.11 94.09 93.87 95.27",
        "pcl": "94.33 95.53 94.74 94.13 95.42",
        "okddip": "94.17 95.14 93.98 92.64 94.83",
    },
}


def figures(dataset: str, model: str, method: str, peers: int) -> list[published.Published]:
    """What stands beside a run of a method's option file."""
    settings = published.option("method", method) | {
        **{"dataset": dataset, "model": model, "method": method, "method.peers": str(peers)}
    }
    return published.published_for(settings)


@pytest.mark.parametrize("dataset", TABLE_OF_PCL)
def test_the_table_of_pcl_stands_beside_runs_with_3_peers(dataset: str) -> None:
    for method, row in TABLE_OF_PCL[dataset].items():
        for model, top1 in zip(MODELS, row.split(), strict=True):
            [figure] = figures(dataset, model, method, peers=3)
            assert (figure.top1, figure.source) == (top1, "pcl"), (method, model)
            # that table says of some methods alone whether their peers share a trunk
            assert set(figure.marks) <= {"structure not stated"}
            assert float(figure.std) < 1


def test_okddips_own_figure_and_the_8_runs_of_a_reader_stand_beside_runs_with_4_peers() -> None:
    assert [str(figure) for figure in figures("cifar100", "resnet32", "okddip", peers=4)] == [
        "74.35 ± 0.15 [okddip]",
        "74.0 ± 0.3 [okddip_rerun, n = 8]",
    ]


def test_every_figure_has_a_source_and_a_method_and_a_model_that_exist() -> None:
    sources = {row["source"]: row["text"] for row in published.read("published_sources.csv")}
    assert "PCL (Wu and Gong, AAAI 2021)" in sources["pcl"]
    assert "run 8 times by a reader" in sources["okddip_rerun"]
    rows = published.read("published_results.csv")
    assert {row["source"] for row in rows} == sources.keys()
    for row in rows:
        assert published.option("method", row["method"]), row
        assert (published.CONFIG_HOME / "conf" / "model" / f"{row['model']}.yaml").is_file(), row
        assert 50 < float(row["top1"]) < 100
    keys = [tuple(row[name] for name in ("dataset", "model", "method", "peers", "source")) for row in rows]
    assert len(set(keys)) == len(keys)
