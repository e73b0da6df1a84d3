"""Tables of runs whose peers are networks of different architectures."""

import pandas as pd
from mlflow.entities import Metric, Param, Run, RunData, RunInfo, RunTag

from okddip.tasks.report.compare import Comparison, Group
from okddip.tasks.report.costs import cost_of
from okddip.tasks.report.runs import different_peers
from okddip.tasks.report.tables import peers_line


def run(peers: str, leader: float) -> Run:
    info = RunInfo("a" * 32, "0", "somebody", "FINISHED", 0, 1, "active")
    accuracies = {"test/peer0/top1": 70.0, "test/peer1/top1": 80.0, "test/leader/top1": leader}
    return Run(
        info,
        RunData(
            [Metric(name, value, 0, 0) for name, value in accuracies.items()],
            [Param("method", "okddip"), Param("model", "a+b+c"), Param("model.peers", peers)],
            [RunTag("parameters.peers", "[10,2000,30]")],
        ),
    )


def line(*members: Run) -> str:
    settings = {"method": "okddip", "model": "a+b+c"}
    values, cost = {"method": "okddip"}, cost_of(members)
    group = Group(values, settings, list(members), pd.DataFrame(), {}, "leader", cost, [], None)
    return peers_line(Comparison("digits", ["method"], {}, [group], "", {}, "none", 0), group)


def test_each_peer_is_named_with_its_model_its_size_and_its_accuracy() -> None:
    found = line(run("[a,b,c]", 90.0), run("[a,b,c]", 92.0))
    assert found == (
        "okddip of a+b+c, after the last epoch: peer0 (a), 10 parameters, 70.00 ± 0.00; peer1 (b),"
        " 2,000 parameters, 80.00 ± 0.00; leader (c), 30 parameters, 91.00 ± 1.41."
    )


def test_equal_peers_are_not_named_one_by_one() -> None:
    assert different_peers(run("null", 90.0)) == []
    assert line(run("null", 90.0)) == ""
