import math

import pytest
import torch
from torch import Tensor, nn

from okddip.errors import ConfigError
from okddip.models.backbone import Backbone
from okddip.models.densenet import densenet
from okddip.models.group import PeerGroup


@pytest.mark.parametrize(("depth", "growth"), [(40, 12), (100, 12), (100, 40), (190, 12)])
def test_depth_counts_the_layers_with_weights(depth: int, growth: int) -> None:
    with torch.device("meta"):
        backbone = densenet(10, depth=depth, growth=growth)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in backbone.modules()) == depth
    layers = (depth - 4) // 6
    assert [len(backbone.trunk.block1), len(backbone.trunk.block2), len(backbone.head.block3)] == [layers] * 3
    assert backbone.feature_dim == backbone.trunk_channels + layers * growth


def test_branches_own_their_block_and_final_norm() -> None:
    group = PeerGroup(lambda: densenet(10, depth=10, growth=4), peers=3)
    for part in ("block3", "norm"):
        owned = [{p.data_ptr() for p in getattr(peer.head, part).parameters()} for peer in group.peers]
        assert len(set.union(*owned)) == sum(map(len, owned))


def test_initial_weights_are_the_authors() -> None:
    torch.manual_seed(0)
    backbone = densenet(10, depth=40, growth=12)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / module.weight[0].numel())
            tolerance = 5 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(expected, rel=tolerance)
    assert isinstance(backbone.classifier, nn.Linear)
    assert not backbone.classifier.bias.any()


def step(network: Backbone, images: Tensor) -> int:
    """Run forward and backward; return the bytes that autograd kept between them, weights apart."""
    weights = {p.data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network(images).square().sum()
    loss.backward()
    return sum(kept.values())


def test_efficient_gives_the_same_numbers_in_less_memory() -> None:
    images = torch.randn(4, 3, 16, 16)
    networks, kept = [], []
    for efficient in (False, True):
        torch.manual_seed(0)
        network = densenet(10, depth=22, growth=4, dropout=0.2, efficient=efficient)
        kept.append(step(network, images))
        networks.append(network)
    plain, efficient_one = networks
    for p, q in zip(plain.parameters(), efficient_one.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    # computing a norm again must not count the batch again
    for (name, p), q in zip(plain.named_buffers(), efficient_one.buffers(), strict=True):
        assert torch.equal(p, q), name
    assert kept[1] < 0.7 * kept[0]


@pytest.mark.slow
def test_efficient_training_step_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = densenet(10, depth=10, growth=4, efficient=True).double()
        forward = torch.compile(network, backend="aot_eager", fullgraph=True) if compiled else network
        forward(images).square().sum().backward()
        results.append(([p.grad for p in network.parameters()], list(network.buffers())))
    torch.testing.assert_close(*results)


def test_dropout_acts_while_training_alone() -> None:
    torch.manual_seed(0)
    network = densenet(10, depth=10, growth=4, dropout=0.5)
    images = torch.randn(2, 3, 8, 8)
    assert not torch.equal(network(images), network(images))
    network.eval()
    assert torch.equal(network(images), network(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 41, "growth": 12}, r"model\.depth=41: must be 6n\+4, such as 40 or 46"),
        ({"depth": 4, "growth": 12}, r"model\.depth=4: .*at least 10"),
        ({"depth": 40, "growth": 0}, r"model\.growth=0: .*at least 1"),
        ({"depth": 40, "growth": 12, "dropout": 1}, r"model\.dropout=1: .*less than 1"),
        (
            {"depth": 40, "growth": 12, "efficient": "yes"},
            r"model\.efficient=yes: must be one of True, False",
        ),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        densenet(10, **options)
