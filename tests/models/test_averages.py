"""Moving averages of the weights of peers."""

import copy
from functools import partial

import pytest
import torch

from okddip.models.averages import MovingAverages
from okddip.models.group import PeerGroup
from okddip.models.resnet import resnet
from okddip.tasks.benchmark.counting import OperatorCounter


def group_of_two() -> PeerGroup:
    return PeerGroup(partial(resnet, 10, depth=8), 2)


def test_the_average_is_the_mean_of_all_steps_and_then_decays_with_its_statistics() -> None:
    group = group_of_two()
    averages = MovingAverages(group, 0.75)
    expected: dict[str, torch.Tensor] = {}
    for step in range(6):
        for tensor in (*group.parameters(), *group.buffers()):
            with torch.no_grad():
                tensor.normal_() if tensor.is_floating_point() else tensor.add_(1)
        averages.update(group)
        decay = min(1 - 1 / (step + 1), 0.75)
        for name, tensor in group.state_dict().items():
            new = (
                decay * expected.get(name, 0) + (1 - decay) * tensor if tensor.is_floating_point() else tensor
            )
            expected[name] = new.clone()
    for name, tensor in averages.group.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_averages_go_on_where_they_were_saved_and_read_nothing_from_the_device() -> None:
    group = group_of_two()
    group.keep_averages(0.9, in_training=False)
    group.update_averages()
    saved = copy.deepcopy(group.averages[0].state_dict())
    other = MovingAverages(group, 0.9)
    other.load_state_dict(saved)
    assert other.step == 1
    with pytest.raises(ValueError, match="averages cannot be of many steps"):
        other.set_extra_state("many")  # type: ignore[arg-type]
    with OperatorCounter() as operators:
        group.update_averages()
    assert operators.host_reads == 0


def test_averages_are_no_part_of_the_group_and_are_asked_in_evaluations_alone() -> None:
    group, plain = group_of_two(), group_of_two()
    group.keep_averages(0.9, in_training=False)
    assert group.state_dict().keys() == plain.state_dict().keys()
    assert len(list(group.parameters())) == len(list(plain.parameters()))
    images = torch.randn(2, 3, 16, 16)
    assert group.train()(images).averages is None
    group.eval()
    with torch.no_grad():
        before = group(images).averages
        group.peers[0].classifier.bias.add_(1)
        assert torch.equal(group(images).averages, before)
        group.update_averages()  # the first update takes the weights as they are
        torch.testing.assert_close(group(images).averages, group(images).logits)
