"""Peer groups: what is shared, what is not, and the gradient where the trunk ends."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from okddip.errors import ConfigError
from okddip.models.group import PeerGroup, rescale_gradient
from okddip.models.resnet import resnet

GOLDEN = Path(__file__).parents[1] / "golden" / "methods.npz"
resnet8 = partial(resnet, 10, depth=8)


def test_state_dict_names_say_who_owns_what() -> None:
    with torch.device("meta"):
        branches = PeerGroup(resnet8, peers=2)
        networks = PeerGroup(resnet8, peers=2, structure="network")
    tops = {".".join(name.split(".")[:3]) for name in branches.state_dict()}
    assert {top for top in tops if top.startswith("peers")} == {
        f"peers.{i}.{part}" for i in range(2) for part in ("head", "classifier")
    }
    assert all(top.startswith(("trunk.", "peers.")) for top in tops)
    assert {".".join(name.split(".")[:3]) for name in networks.state_dict()} == {
        f"peers.{i}.{part}" for i in range(2) for part in ("trunk", "head", "classifier")
    }


def test_branches_share_the_trunk_alone() -> None:
    group = PeerGroup(resnet8, peers=3)
    images = torch.randn(2, 3, 16, 16)
    group(images).logits[1].sum().backward()
    assert all(p.grad is not None for p in group.trunk.parameters())
    assert all(p.grad is not None for p in group.peers[1].parameters())
    # stacking the peers' logits sends the other branches a gradient of zeros
    others = [p for i in (0, 2) for p in group.peers[i].parameters()]
    assert all(p.grad is None or not p.grad.any() for p in others)


def test_networks_share_nothing() -> None:
    group = PeerGroup(resnet8, peers=2, structure="network")
    storages = [{p.data_ptr() for p in peer.parameters()} for peer in group.peers]
    assert storages[0].isdisjoint(storages[1])
    first = [next(peer.parameters()) for peer in group.peers]
    assert not torch.equal(first[0], first[1])


def test_rescaling_reproduces_the_authors_gradient() -> None:
    golden = np.load(GOLDEN)
    x = torch.tensor(golden["cl_ilr/ilr_input"], requires_grad=True)
    peers = golden["input/logits"].shape[-1]
    y = rescale_gradient(x, 1 / peers)
    assert torch.equal(y, x)
    y.backward(torch.arange(12, dtype=torch.float64).reshape(3, 4))
    torch.testing.assert_close(x.grad, torch.tensor(golden["cl_ilr/ilr_grad"]), rtol=1e-12, atol=1e-12)


def test_rescaling_reaches_the_trunk_alone() -> None:
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    groups = []
    for rescale in (False, True):
        torch.manual_seed(0)
        groups.append(PeerGroup(resnet8, peers=4, rescale=rescale).double())
    plain, rescaled = groups
    outputs = [group(images) for group in groups]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.logits.square().sum().backward()
    for p, q in zip(plain.trunk.parameters(), rescaled.trunk.parameters(), strict=True):
        assert p.grad.any()
        torch.testing.assert_close(q.grad, p.grad / 4)
    for p, q in zip(plain.peers.parameters(), rescaled.peers.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.slow
def test_rescaled_training_step_compiles_into_one_graph() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    group = PeerGroup(resnet8, peers=2, rescale=True).double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    gradients = []
    for forward in (group, torch.compile(group, backend="aot_eager", fullgraph=True)):
        group.zero_grad()
        forward(images).logits.square().sum().backward()
        gradients.append([p.grad for p in group.parameters()])
    torch.testing.assert_close(*gradients)


def test_extracted_peer_keeps_its_description() -> None:
    with torch.device("meta"):
        group = PeerGroup(resnet8, peers=2)
        peer, plain = group.extract(1), resnet8()
    assert list(peer.state_dict()) == list(plain.state_dict())
    for attribute in ("feature_dim", "trunk_channels", "minimum_size"):
        assert getattr(peer, attribute) == getattr(plain, attribute)


def test_unknown_structure_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.structure=tree: must be one of branch, network"):
        PeerGroup(resnet8, peers=2, structure="tree")


@pytest.mark.parametrize("peers", [0, -1, 2.5])
def test_peers_must_be_a_positive_whole_number(peers: float) -> None:
    with pytest.raises(ConfigError, match=r"method\.peers=.*whole number at least 1"):
        PeerGroup(resnet8, peers=peers)  # type: ignore[arg-type]


def test_rescaling_needs_a_shared_trunk() -> None:
    with pytest.raises(ConfigError, match=r"method\.rescale=true: .*shared trunk"):
        PeerGroup(resnet8, peers=2, structure="network", rescale=True)


@pytest.mark.parametrize("structure", ["branch", "network"])
def test_each_peer_sees_its_own_view(structure: str) -> None:
    group = PeerGroup(resnet8, peers=2, structure=structure).eval()
    views = torch.randn(3, 2, 3, 16, 16)  # [B, P, C, H, W]
    output = group(views)
    for peer in range(2):
        torch.testing.assert_close(output.logits[peer], group(views[:, peer]).logits[peer])
    if structure == "branch":
        torch.testing.assert_close(output.trunk, sum(group(views[:, peer]).trunk for peer in range(2)) / 2)


wide = partial(resnet, 10, depth=11, block="bottleneck")  # 256 features, where resnet8 has 64


def test_networks_of_different_architectures_stand_side_by_side() -> None:
    group = PeerGroup([resnet8, wide], 2, "network").eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        output = group(images)
        for index in range(2):
            peer = group.extract(index)
            features = peer.head(peer.trunk(images))
            assert torch.equal(output.logits[index], peer(images))
            assert torch.equal(output.features[index, :, : peer.feature_dim], features)
            assert not output.features[index, :, peer.feature_dim :].any()
    assert [group.extract(index).feature_dim for index in range(2)] == [64, 256]


def test_a_list_of_one_architecture_draws_the_weights_of_equal_peers() -> None:
    torch.manual_seed(5)
    equal = PeerGroup(resnet8, 2, "network").state_dict()
    torch.manual_seed(5)
    listed = PeerGroup([resnet8, resnet8], 2, "network").state_dict()
    assert list(equal) == list(listed)
    assert all(torch.equal(equal[name], listed[name]) for name in equal)


def test_what_different_networks_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="share no trunk"):
        PeerGroup([resnet8, wide], 2, "branch")
    with pytest.raises(ConfigError, match=r"method\.peers=3: there are 2 networks"):
        PeerGroup([resnet8, wide], 3, "network")
    group = PeerGroup([resnet8, wide], 2, "network", maps=True)
    with pytest.raises(ConfigError, match=r"maps of all peers, and those .* \(64x4x4, 256x4x4\)"):
        group(torch.randn(2, 3, 16, 16))
