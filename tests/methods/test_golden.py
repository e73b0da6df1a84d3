"""Every number in golden/methods.npz, which the authors' implementation computed, through the methods."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from okddip.methods.base import Method
from okddip.methods.losses import log_softened, mean_of_others, ramp_weight, soft_loss
from okddip.methods.okddip import OKDDip
from okddip.methods.one import ONE
from okddip.outputs import GroupOutput
from okddip.training import metrics

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "methods.npz")
STUDENTS = 5
OPTIONS = ["method.temperature=3", "method.alpha=0.7"]

MakeMethod = Callable[..., Method]


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def golden_students(name: str) -> Tensor:
    """The file has students last, [B, X, M]; here they come first, [M, B, X]."""
    return golden(name).permute(2, 0, 1).contiguous()


def agrees(value: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest absolute value: the authors add 1e-7 to the target probabilities."""
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.fixture
def output() -> GroupOutput:
    logits = golden_students("input/logits").requires_grad_()
    features = golden_students("input/features").requires_grad_()
    return GroupOutput(logits, features, torch.zeros(6, 4, 1, 1, dtype=torch.float64))


LABELS = golden("input/labels")
RAMP = golden("input/ramp_weight")


@pytest.mark.parametrize(
    ("name", "option", "overrides", "parts"),
    [
        ("independent", "independent", [], []),
        ("dml_ensemble", "dml", ["method.temperature=3", "method.target=ensemble"], ["hard", "soft"]),
        ("dml_pairwise", "dml", ["method.temperature=3", "method.target=pairwise"], ["hard", "soft"]),
        ("cl_ilr", "cl_ilr", OPTIONS, ["hard", "soft"]),
        ("okddip", "okddip", OPTIONS, ["hard", "first_level", "second_level"]),
    ],
)
def test_losses_and_gradients_agree_with_the_authors(
    make_method: MakeMethod,
    output: GroupOutput,
    name: str,
    option: str,
    overrides: list[str],
    parts: list[str],
) -> None:
    method = make_method(option, f"method.peers={STUDENTS}", *overrides, feature_dim=16).double()
    if isinstance(method, OKDDip):
        method.load_state_dict(
            {"query.weight": golden("input/query_weight"), "key.weight": golden("input/key_weight")}
        )
    losses = method(output, LABELS, RAMP)
    losses.total.backward()
    agrees(losses.total, golden(f"{name}/total"))
    agrees(output.logits.grad, golden_students(f"{name}/grad_logits"))
    for part in parts:
        agrees(losses.parts[part], golden(f"{name}/{part}"))
    if isinstance(method, OKDDip):
        agrees(output.features.grad, golden_students("okddip/grad_features"))
        agrees(method.query.weight.grad, golden("okddip/grad_query_weight"))
        agrees(method.key.weight.grad, golden("okddip/grad_key_weight"))


def test_baseline_agrees_with_the_authors(make_method: MakeMethod, output: GroupOutput) -> None:
    losses = make_method("baseline")(first_student(output), LABELS, RAMP)
    losses.total.backward()
    agrees(losses.total, golden("baseline/total"))
    agrees(output.logits.grad, golden_students("baseline/grad_logits"))


def test_kd_agrees_with_the_authors_and_holds_its_teacher_constant(
    make_method: MakeMethod, output: GroupOutput
) -> None:
    method = make_method("kd", "method.teacher=teacher.pt", *OPTIONS)
    losses = method(first_student(output)._replace(teacher=output.logits[1]), LABELS, RAMP)
    losses.total.backward()
    agrees(losses.total, golden("kd/total"))
    agrees(losses.parts["hard"], golden("kd/hard"))
    agrees(losses.parts["soft"], golden("kd/soft"))
    agrees(output.logits.grad, golden_students("kd/grad_logits"))


def first_student(output: GroupOutput) -> GroupOutput:
    return output._replace(logits=output.logits[:1], features=output.features[:1])


def test_one_agrees_with_the_authors(make_method: MakeMethod, output: GroupOutput) -> None:
    method = make_method("one", f"method.peers={STUDENTS}", *OPTIONS, trunk_channels=4)
    assert isinstance(method, ONE)
    scores = golden("input/one_gate_scores").requires_grad_()
    method.gate = nn.Sequential(Constant(scores))
    losses = method(output, LABELS, RAMP)
    losses.total.backward()
    agrees(losses.total, golden("one/total"))
    agrees(losses.parts["hard"], golden("one/hard"))
    agrees(losses.parts["soft"], golden("one/soft"))
    agrees(losses.predictions[method.predictors.index("teacher")], golden("one/teacher_logits"))
    agrees(output.logits.grad, golden_students("one/grad_logits"))
    agrees(scores.grad, golden("one/grad_gate_scores"))


class Constant(nn.Module):
    """Answers the same scores to all inputs."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, pooled: Tensor) -> Tensor:
        return self.scores


def test_divergence_and_its_gradient_on_both_sides(output: GroupOutput) -> None:
    logits = output.logits
    value = soft_loss(logits[0], log_softened(logits[1], 3.0), 3.0)
    value.backward()
    agrees(value, golden("kl/value"))
    agrees(value, golden("kl_both_sides/total"))
    agrees(logits.grad, golden_students("kl_both_sides/grad_logits"))


def test_targets_of_cl_ilr_are_the_mean_of_the_others(output: GroupOutput) -> None:
    agrees(mean_of_others(output.logits), golden_students("cl_ilr/targets"))


def test_attention_and_targets_of_okddip(make_method: MakeMethod, output: GroupOutput) -> None:
    method = make_method("okddip", f"method.peers={STUDENTS}", *OPTIONS, feature_dim=16).double()
    assert isinstance(method, OKDDip)
    method.load_state_dict(
        {"query.weight": golden("input/query_weight"), "key.weight": golden("input/key_weight")}
    )
    attention = method.attend(output.features[:-1])
    agrees(attention, golden("okddip/attention"))
    peer_targets, leader_target = method.log_targets(attention, output.logits[:-1])
    agrees(peer_targets, log_softened(golden_students("okddip/targets"), 3.0))
    agrees(leader_target[0], log_softened(output.logits[:-1].mean(0), 3.0))


def test_diversity_of_the_auxiliary_peers(output: GroupOutput) -> None:
    agrees(metrics.diversity(output.logits[:-1]), golden("okddip/diversity"))


def test_ramp_weights() -> None:
    weights = [ramp_weight(int(epoch), 80) for epoch in golden("ramp/epochs")]
    assert weights == pytest.approx(golden("ramp/weights_length_80").tolist(), rel=1e-12)
