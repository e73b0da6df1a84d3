"""What holds for every model: built from its option file, alone and as peers."""

import pytest
import torch
from dispatch_watch import needs_pretended_cuda
from model_options import OPTIONS, factory, parameters
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode

from okddip.models.group import PeerGroup

# One or two of each file in okddip/models, some of them smaller; the others differ in depth and width alone.
KINDS = {
    "resnet8": {},
    "wrn20_8": {"depth": 11, "inner_width": 2},
    "vgg16": {"dropout": 0.5},
    "densenet40_12": {"depth": 16, "dropout": 0.2},
    "densenet100_12": {"depth": 10, "efficient": True},
    "resnet18": {},
    "torchvision": {"name": "mobilenet_v3_small", "split": "features.8"},
}


def test_kinds_cover_every_factory() -> None:
    targets = {OmegaConf.load(path)["_target_"] for path in OPTIONS.glob("*.yaml")}
    assert targets == {OmegaConf.load(OPTIONS / f"{option}.yaml")["_target_"] for option in KINDS}


@pytest.mark.parametrize("option", sorted(path.stem for path in OPTIONS.glob("*.yaml")))
def test_option_builds_a_backbone_without_memory(option: str) -> None:
    changes = KINDS["torchvision"] if option == "torchvision" else {}
    with torch.device("meta"):
        backbone = factory(option, num_classes=7, **changes)()
        images = torch.empty(2, 3, 64, 64)
        trunk = backbone.trunk(images)
        features = backbone.head(trunk)
        logits = backbone.classifier(features)
    assert trunk.ndim == 4
    assert trunk.shape[:2] == (2, backbone.trunk_channels)
    assert features.shape == (2, backbone.feature_dim)
    assert logits.shape == (2, 7)


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("option", KINDS)
def test_channels_and_sizes(option: str, in_channels: int) -> None:
    with torch.device("meta"):
        backbone = factory(option, in_channels=in_channels, **KINDS[option])()
        for size in (16, 28, 32):
            images = torch.empty(2, in_channels, size, size)
            if size >= backbone.minimum_size:
                assert backbone(images).shape == (2, 10)
            else:
                with pytest.raises(RuntimeError):
                    backbone(images)


@pytest.mark.parametrize("structure", ["branch", "network"])
@pytest.mark.parametrize("option", KINDS)
def test_peers(option: str, structure: str) -> None:
    """A step trains every parameter; a peer taken out gives its logits exactly and is a copy."""
    torch.manual_seed(0)
    make = factory(option, **KINDS[option])
    group = PeerGroup(make, peers=2, structure=structure)
    images = torch.randn(4, 3, 32, 32)

    output = group(images)
    assert output.logits.shape == (2, 4, 10)
    assert output.features.shape == (2, 4, group.dimensions[0]["feature_dim"])
    assert not torch.equal(output.logits[0], output.logits[1])  # each has its own initial weights
    if structure == "branch":
        assert output.trunk is not None
        assert output.trunk.shape[:2] == (4, group.dimensions[0]["trunk_channels"])
    else:
        assert output.trunk is None
    (output.logits.square().sum() + output.features.square().sum()).backward()
    without = [name for name, p in group.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without

    group.eval()
    with torch.no_grad():
        before = group(images).logits
        for i in range(2):
            peer = group.extract(i)
            assert torch.equal(peer(images), before[i])
            assert parameters(peer) == parameters(make())
        for p in peer.parameters():
            p.zero_()
        assert torch.equal(group(images).logits, before)
        peer = group.extract(0)
        for p in group.parameters():
            p.zero_()
        assert torch.equal(peer(images), before[0])


@pytest.mark.parametrize("option", ["resnet8", "wrn20_8", "vgg16", "densenet40_12", "resnet18"])
def test_channels_last_is_kept(option: str) -> None:
    torch.manual_seed(0)
    backbone = factory(option, **KINDS[option])().to(memory_format=torch.channels_last)
    kept = []
    for module in backbone.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda module, inputs, output: kept.append(
                    inputs[0].is_contiguous(memory_format=torch.channels_last)
                )
            )
    backbone(torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last))
    assert len(kept) > 5
    assert all(kept)


@needs_pretended_cuda
@pytest.mark.parametrize("option", KINDS)
def test_forward_names_no_device(option: str) -> None:
    """A group built and run on a pretended GPU stays on it."""
    with FakeTensorMode(), torch.device("cuda"):
        group = PeerGroup(factory(option, **KINDS[option]), peers=2)
        output = group(torch.empty(2, 3, 32, 32))
    assert {tensor.device.type for tensor in output if tensor is not None} == {"cuda"}


@pytest.mark.slow
@pytest.mark.parametrize("option", ["resnet8", "vgg16", "densenet40_12", "resnet18", "torchvision"])
def test_compiles_into_one_graph(option: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    changes = {**KINDS[option], "dropout": 0} if "dropout" in KINDS[option] else KINDS[option]
    group = PeerGroup(factory(option, **changes), peers=2, rescale=True).eval()
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(group, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images).logits, group(images).logits)
