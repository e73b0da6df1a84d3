from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from okddip.errors import ConfigError
from okddip.methods.okddip import OKDDip
from okddip.outputs import GroupOutput

PEERS, BATCH, CLASSES, FEATURES = 4, 8, 10, 64
T = 3.0


@pytest.fixture
def make_okddip(make_method: Callable[..., OKDDip]) -> Callable[..., OKDDip]:
    return lambda *overrides: make_method("okddip", *(f"method.{override}" for override in overrides))


def random_output() -> GroupOutput:
    logits = torch.randn(PEERS, BATCH, CLASSES, requires_grad=True)
    features = torch.randn(PEERS, BATCH, FEATURES, requires_grad=True)
    return GroupOutput(logits, features, None)


LABELS = torch.arange(BATCH)
ONE = torch.tensor(1.0)


def test_without_attention_every_target_is_the_mean_and_nothing_is_projected(
    make_okddip: Callable[..., OKDDip],
) -> None:
    method = make_okddip("attention=false")
    output = random_output()
    attention = method.attend(output.features[:3])
    assert list(method.parameters()) == []
    torch.testing.assert_close(attention, torch.full((BATCH, 3, 3), 1 / 3))
    targets, _ = method.log_targets(attention, output.logits[:3])
    mean = output.logits[:3].mean(0)
    torch.testing.assert_close(targets, F.log_softmax(mean / T, -1).expand(3, -1, -1))


@pytest.mark.parametrize("attention", ["true", "false"])
def test_without_itself_a_peer_learns_from_the_others_only(
    make_okddip: Callable[..., OKDDip], attention: str
) -> None:
    method = make_okddip("include_self=false", f"attention={attention}")
    weights = method.attend(random_output().features[:3])
    torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, 3))
    assert (weights.diagonal(dim1=1, dim2=2) == 0).all()
    if attention == "false":
        assert weights[0, 0].tolist() == [0, 0.5, 0.5]


def test_attention_differs_between_peers_and_samples(make_okddip: Callable[..., OKDDip]) -> None:
    weights = make_okddip().attend(random_output().features[:3])
    assert (weights[0, 0] - weights[0, 1]).abs().max() > 1e-3
    assert (weights[0] - weights[1]).abs().max() > 1e-3


def test_without_a_leader_all_are_auxiliary_peers(make_okddip: Callable[..., OKDDip]) -> None:
    method = make_okddip("leader=false")
    losses = method(random_output(), LABELS, ONE)
    assert set(losses.parts) == {"hard", "first_level"}
    assert method.predictors == ("peer0", "peer1", "peer2", "peer3", "ensemble")
    assert method.primary == "ensemble"
    assert method.auxiliary == PEERS
    assert make_okddip("leader=false", "peers=2").peers == 2


def test_the_leader_is_the_last_peer_and_learns_from_the_mean_of_the_others(
    make_okddip: Callable[..., OKDDip],
) -> None:
    method = make_okddip()
    output = random_output()
    losses = method(output, LABELS, ONE)
    assert method.predictors[method.kept] == method.primary == "leader"
    assert torch.equal(losses.predictions[method.kept], output.logits[-1])
    target = F.softmax(output.logits[:3].mean(0) / T, -1)
    divergence = F.kl_div(F.log_softmax(output.logits[3] / T, -1), target, reduction="batchmean") * T**2
    torch.testing.assert_close(losses.parts["second_level"], divergence)


def test_detached_targets_send_gradients_to_the_projections_alone(make_okddip: Callable[..., OKDDip]) -> None:
    method = make_okddip("detach_targets=true")
    output = random_output()
    method(output, LABELS, ONE).parts["first_level"].backward()
    targets, _ = method.log_targets(method.attend(output.features[:3]), output.logits[:3])
    # of T^2 KL(softmax(target / T) | softmax(logits / T)), batch mean, with the target held constant
    expected = T / BATCH * (F.softmax(output.logits[:3] / T, -1) - targets.exp())
    torch.testing.assert_close(output.logits.grad[:3], expected)
    assert (output.logits.grad[3] == 0).all()
    for projection in (method.query, method.key):
        assert projection.weight.grad.abs().max() > 1e-6


def test_probabilities_are_mixed_after_the_softmax(make_okddip: Callable[..., OKDDip]) -> None:
    method = make_okddip("aggregate=probabilities")
    output = random_output()
    attention = method.attend(output.features[:3])
    targets, leader_target = method.log_targets(attention, output.logits[:3])
    probabilities = F.softmax(output.logits[:3] / T, -1)
    mixed = sum(attention[:, 1, b, None] * probabilities[b] for b in range(3))
    torch.testing.assert_close(targets[1].exp(), mixed)
    torch.testing.assert_close(leader_target[0].exp(), probabilities.mean(0))


def test_probabilities_that_underflow_give_finite_losses(make_okddip: Callable[..., OKDDip]) -> None:
    method = make_okddip("aggregate=probabilities", "temperature=0.5")
    logits = torch.zeros(PEERS, BATCH, CLASSES)
    logits[..., 0] = 300
    logits.requires_grad_()
    total = method(GroupOutput(logits, torch.randn(PEERS, BATCH, FEATURES), None), LABELS, ONE).total
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(("alpha", "ramp"), [(0.0, 1.0), (1.0, 0.0), (0.5, 0.25)])
def test_alpha_and_ramp_weigh_both_levels(
    make_okddip: Callable[..., OKDDip], alpha: float, ramp: float
) -> None:
    losses = make_okddip(f"alpha={alpha}")(random_output(), LABELS, torch.tensor(ramp))
    parts = losses.parts
    expected = parts["hard"] + alpha * ramp * (parts["first_level"] + parts["second_level"])
    torch.testing.assert_close(losses.total, expected)


def test_temperature_softens_targets(make_okddip: Callable[..., OKDDip]) -> None:
    def entropy(temperature: float) -> Tensor:
        torch.manual_seed(0)
        method = make_okddip(f"temperature={temperature}")
        output = random_output()
        targets, _ = method.log_targets(method.attend(output.features[:3]), output.logits[:3])
        return -(targets.exp() * targets).sum(-1).mean()

    assert entropy(1) < entropy(3) < entropy(10)


def test_the_ramp_begins_after_ramp_start_and_lasts_ramp_epochs(make_okddip: Callable[..., OKDDip]) -> None:
    plain = make_okddip().ramp
    assert plain(0) == pytest.approx(0.0067379469990854670)  # exp(-5)
    assert plain(79) < 1 == plain(80)
    late = make_okddip("ramp_start=0.5").ramp
    assert late(149) == 1  # as in the authors' code
    assert [late(150 + epoch) for epoch in range(100)] == [plain(epoch) for epoch in range(100)]
    relative = make_okddip("ramp_epochs=0.5").ramp
    assert relative(149) < 1 == relative(150)
    assert make_okddip("ramp_epochs=0").ramp(0) == 1


def test_the_projection_factor_divides_the_features(make_okddip: Callable[..., OKDDip]) -> None:
    assert make_okddip().query.weight.shape == (8, 64)
    assert make_okddip("projection_factor=4").key.weight.shape == (16, 64)


@pytest.mark.parametrize(
    "override",
    [
        *("peers=2", "peers=1", "peers=2.5", "peers=true", "temperature=0", "temperature=hot", "alpha=-1"),
        *("ramp_epochs=-1", "ramp_start=2", "loss=mse", "leader=maybe", "attention=1", "aggregate=mean"),
        *("projection_factor=0", "projection_factor=65", "structure=tree", "rescale=2"),
    ],
)
def test_values_out_of_range_are_refused_by_name(make_okddip: Callable[..., OKDDip], override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"method.{key}="):
        make_okddip(override)
