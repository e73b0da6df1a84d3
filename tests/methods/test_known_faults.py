"""What circulating reimplementations of the newer methods get wrong, and is right here.

KDCL's target as a plain mean of logits; a ramp that stays at 0 for 80 epochs; a moving average whose decay is
always 0; batch norm statistics that are never averaged.
"""

import copy
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okddip.errors import ConfigError
from okddip.methods.base import Method
from okddip.methods.kdcl import KDCL
from okddip.models.averages import MovingAverages
from okddip.outputs import GroupOutput
from okddip.run.parts import Parts
from okddip.tasks.benchmark.steps import TrainerSteps

MakeMethod = Callable[..., Method]


def test_the_target_of_kdcl_is_as_sure_of_the_label_as_the_surest_peer_which_no_plain_mean_is(
    make_method: MakeMethod,
) -> None:
    method = make_method("kdcl", "method.peers=3")
    assert isinstance(method, KDCL)
    assert method.target == "minlogit"
    logits, labels = 3 * torch.randn(3, 64, 10), torch.randint(10, (64,))
    every = torch.stack([F.cross_entropy(peer, labels, reduction="none") for peer in logits])  # [P, B]
    target = method.target_logits(logits, labels)
    assert (F.cross_entropy(target, labels, reduction="none") <= every.amin(0) + 1e-5).all()
    mean = F.cross_entropy(logits.mean(0), labels, reduction="none")
    assert (mean > every.amin(0) + 0.1).float().mean() > 0.5
    # nothing but logits counted from the label's: a peer that adds a constant to its own changes nothing
    shifted = logits + torch.tensor([-5.0, 0.0, 5.0])[:, None, None]
    torch.testing.assert_close(method.target_logits(shifted, labels), target, rtol=0, atol=1e-5)


@pytest.mark.parametrize("option", ["cl_ilr", "one", "okddip", "ffl", "pcl"])
def test_the_ramp_grows_with_every_one_of_its_80_epochs_and_reaches_the_loss(
    make_method: MakeMethod, option: str
) -> None:
    method = make_method(option, "method.peers=3")
    weights = [method.ramp(epoch) for epoch in range(300)]
    assert weights[0] == pytest.approx(math.exp(-5))
    assert weights[40] == pytest.approx(math.exp(-1.25))
    assert all(later > earlier for earlier, later in pairwise(weights[:81]))
    assert weights[80:] == [1.0] * 220
    output = GroupOutput(
        *(torch.randn(3, 8, 10), torch.randn(3, 8, 64), torch.randn(8, 32, 2, 2)),
        averages=torch.randn(3, 8, 10) if method.needs_averages else None,
        maps=torch.randn(3, 8, 64, 2, 2),
    )
    for weight in (weights[1], weights[40]):
        losses = method(output, torch.arange(8), torch.tensor(weight))
        soft = sum(part for name, part in losses.parts.items() if name != "hard")
        torch.testing.assert_close(losses.total - losses.parts["hard"], weight * soft, rtol=1e-4, atol=1e-5)


def test_kdcl_has_no_ramp_until_it_is_asked_for_one(make_method: MakeMethod) -> None:
    method = make_method("kdcl")
    assert {method.ramp(epoch) for epoch in range(300)} == {1.0}
    assert make_method("kdcl", "method.ramp_epochs=80").ramp(40) == pytest.approx(math.exp(-1.25))
    with pytest.raises(
        ConfigError, match=r"method.ramp_start=0.3, method.ramp_epochs=null: there is no ramp"
    ):
        make_method("kdcl", "method.ramp_start=0.3")


@pytest.mark.parametrize("stop", [1, 3, 15])
def test_the_decay_follows_the_step_and_goes_on_after_a_resume(stop: int) -> None:
    """Of weights that are 1 in their own step alone, an average tells what each step counts in it."""

    def of_step(step: int) -> nn.Module:
        module = nn.Linear(20, 1, bias=False)
        nn.init.zeros_(module.weight)[0, step] = 1
        return module

    with torch.no_grad():
        averages = MovingAverages(of_step(0), 0.9)
        expected = torch.zeros(20)
        for step in range(20):
            if step == stop:  # another process
                saved = averages.state_dict()
                averages = MovingAverages(of_step(19), 0.9)
                averages.load_state_dict(copy.deepcopy(saved))
            averages.update(of_step(step))
            decay = min(1 - 1 / (step + 1), 0.9)
            expected *= decay
            expected[step] += 1 - decay
            found = next(averages.group.parameters())[0]
            torch.testing.assert_close(found, expected)
            if step < 10:  # the plain mean of all steps
                torch.testing.assert_close(found[: step + 1], torch.full((step + 1,), 1 / (step + 1)))
    assert found[19] == pytest.approx(0.1)
    assert found[18] == pytest.approx(0.09)


@pytest.fixture
def steps(synthetic_parts: Callable[..., Parts]) -> TrainerSteps:
    return TrainerSteps(synthetic_parts("method=pcl", "model=resnet8", "trainer.batch_size=8"))


def tensors(group: nn.Module) -> dict[str, Tensor]:
    return {name: value.double().clone() for name, value in group.state_dict().items()}


def test_weights_and_batch_norm_statistics_of_the_mean_teachers_are_means_over_the_steps(
    steps: TrainerSteps,
) -> None:
    group = steps.group.train()
    seen = []
    for _ in range(3):
        steps.train_step()
        seen.append(tensors(group))
    averages = tensors(group.averages[0].group)
    assert averages.keys() == seen[0].keys()
    for name, average in averages.items():
        if name.endswith("num_batches_tracked"):
            assert average == 3
            continue
        mean = sum(each[name] for each in seen) / 3
        torch.testing.assert_close(average, mean, rtol=1e-5, atol=1e-6, msg=name)
        assert (average - seen[-1][name]).abs().max() > 1e-6, name  # and not merely the last
    assert {name.rpartition(".")[2] for name in averages} >= {"weight", "running_mean", "running_var"}


def test_mean_teachers_normalise_by_their_own_statistics_and_not_by_the_batch(steps: TrainerSteps) -> None:
    group = steps.group.train()
    steps.train_step()
    teachers = group.averages[0].group
    before = tensors(teachers)
    images, _ = steps.next_batch()
    whole, part = group(images).averages, group(images[:3]).averages
    torch.testing.assert_close(whole[:, :3], part)
    assert not teachers.training
    assert all(torch.equal(before[name], value) for name, value in tensors(teachers).items())


def test_pcl_without_mean_teachers_computes_no_moving_averages_in_training(
    synthetic_parts: Callable[..., Parts],
) -> None:
    parts = synthetic_parts("method=pcl", "method.mean_teacher=false", "method.peers=3", "model=resnet8")
    images = torch.randn(4, 3, 32, 32)
    assert parts.group.train()(images).averages is None
    assert parts.group.eval()(images).averages is not None  # what is kept is one of them
