"""Whole short runs of every method, structure and ablation against the losses that they gave before.

A change that is not meant to change numbers leaves `runs.json` as it is. One that is meant to writes it anew,
by `python tests/golden/test_runs.py`, and says why.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("runs.json")

# fp32 on one thread; a ramp that is seen in the second epoch
COMMON = (
    *("dataset=digits", "model=resnet8", "trainer.device=cpu", "trainer.precision=fp32", "tracking=none"),
    *("trainer.epochs=2", "trainer.limit_batches=4", "trainer.batch_size=64", "trainer.eval_batch_size=256"),
    *("optimizer.lr=0.02", "scheduler.milestones=[1]", "methods.ramp_epochs=2"),
)
CASES = {
    "baseline": ["method=baseline"],
    "kd": ["method=kd", "method.teacher=baseline"],
    "independent": ["method=independent"],
    "independent-network": ["method=independent", "method.structure=network"],
    "dml": ["method=dml"],
    "dml-branch": ["method=dml", "method.structure=branch"],
    "dml-pairwise": ["method=dml", "method.target=pairwise"],
    "cl_ilr": ["method=cl_ilr"],
    "cl_ilr-network": ["method=cl_ilr", "method.structure=network", "method.rescale=false"],
    "one": ["method=one"],
    "kdcl": ["method=kdcl"],
    "ffl": ["method=ffl"],
    "pcl": ["method=pcl"],
    "okddip-ema": ["method.ema_decay=0.9"],
    "dml-views": ["method=dml", "method.views=each"],
    "okddip": [],
    "okddip-network": ["method.structure=network"],
    "okddip-network-cross_entropy": ["method.structure=network", "method.loss=ce"],
    **{
        f"okddip-{ablation}": [f"ablation={ablation}"]
        for ablation in (
            *("no_attention", "no_leader", "no_self", "no_distillation", "no_ramp"),
            *("cross_entropy", "detached_targets", "probabilities", "rescaled"),
        )
    },
}

# About three times what two threads in place of one changed in six cases: 3e-4 of total and hard losses,
# 1e-3 of an attention weight, 1e-2 of soft losses and of diversity, small differences of large numbers. The
# weight of the soft losses changes a total by less than rounding does, so it is compared itself.
TOLERANCES = {"loss": 1e-3, "hard_loss": 1e-3, "attention": 3e-3, "ramp": 1e-9, "lr": 1e-9}
OTHERS = 3e-2
COMPARED = ("loss", "diversity", "attention", "train/ramp", "train/lr")


def tolerance(key: str) -> float:
    """Relative, by what a value is: `test/attention/0/1`, `train/hard_loss`."""
    return TOLERANCES.get(key.split("/")[1], OTHERS)


def losses_in(folder: Path) -> list[dict[str, float]]:
    """What is compared of an epoch's line; accuracies are not, they jump where two logits meet."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if any(word in key for word in COMPARED)} for line in lines
    ]


QUICK = ("baseline", "kd", "independent", "dml", "cl_ilr", "one", "okddip", "okddip-no_attention")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_a_run_gives_the_losses_that_it_gave_before(
    okddip: Callable[..., object], tmp_path: Path, name: str
) -> None:
    expected = json.loads(FILE.read_text())
    for case in ["baseline", name] if name == "kd" else [name]:
        answer = okddip(*COMMON, *CASES[case], f"hydra.run.dir={case}")
        assert answer.code == 0, answer.err
    found = losses_in(tmp_path / name)
    assert len(found) == len(expected[name]) == 2
    for ours, theirs in zip(found, expected[name], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=tolerance(key)), key


def write(folder: Path, threads: int = 1) -> dict[str, list[dict[str, float]]]:
    """Run all cases in a folder, each in a process of its own."""
    runs = {}
    for name, overrides in CASES.items():
        command = [sys.executable, "-m", "okddip.main", *COMMON, *overrides, f"hydra.run.dir={name}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        runs[name] = losses_in(folder / name)
    return runs


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        FILE.write_text(json.dumps(write(Path(scratch)), indent=1) + "\n")
