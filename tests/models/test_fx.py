import pytest
import torch
import torchvision

from okddip.errors import ConfigError
from okddip.models.fx import torchvision_model
from okddip.models.group import PeerGroup


@pytest.mark.parametrize(
    ("name", "split", "trunk_channels"),
    [
        ("resnet18", "layer3", 256),
        ("mobilenet_v3_small", "features.8", 48),
        ("efficientnet_b0", "features.5", 112),  # stochastic depth acts while training alone
        ("regnet_y_400mf", "trunk_output.block3", 208),
        ("swin_t", "permute", 768),  # attention asks whether it is training
    ],
)
def test_cut_network_computes_what_the_whole_did(name: str, split: str, trunk_channels: int) -> None:
    networks = []
    for build in (
        lambda: torchvision_model(10, name=name, split=split),
        lambda: torchvision.models.get_model(name, num_classes=10),
    ):
        torch.manual_seed(0)
        networks.append(build())
    images = torch.randn(2, 3, 64, 64)
    for training in (True, False):
        logits = []
        for network in networks:
            torch.manual_seed(1)
            logits.append(network.train(training)(images))
        torch.testing.assert_close(*logits)
    assert networks[0].trunk_channels == trunk_channels


def test_branches_do_not_write_to_what_they_share() -> None:
    """Cut before DenseNet's last, in-place ReLU, each branch would change the others' input."""
    torch.manual_seed(0)
    group = PeerGroup(
        lambda: torchvision_model(10, name="densenet121", split="features.norm5"), peers=2, rescale=True
    ).eval()
    output = group(torch.randn(2, 3, 32, 32))
    assert output.trunk is not None
    assert (output.trunk < 0).any()
    output.logits.sum().backward()


def test_other_channels_replace_the_first_convolution() -> None:
    with torch.device("meta"):
        network = torchvision_model(10, in_channels=1, name="mobilenet_v2", split="features.13")
        assert network(torch.empty(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("mobilnet_v2", "features.3", r"model\.name=mobilnet_v2: .*near names: mobilenet_v2"),
        (None, None, r"model\.name=None: .*it has alexnet, "),
        ("resnet18", None, r"model\.split=None: .*after conv1, "),
        ("xyz", "features.3", r"model\.name=xyz: .*it has alexnet, "),
        ("fasterrcnn_resnet50_fpn", "backbone", r"no classification model of this name"),
        ("googlenet", "inception4e", r"model\.name=googlenet: has auxiliary outputs"),
        ("inception_v3", "Mixed_6e", r"model\.name=inception_v3: has auxiliary outputs"),
        ("squeezenet1_1", "features.9", r"model\.name=squeezenet1_1: does not end in a linear layer"),
        ("vit_b_16", "encoder", r"model\.name=vit_b_16: no module of it gives an image"),
        ("resnet18", "layer5", r"model\.split=layer5: .*after conv1, .*layer3, .*and after parts of these"),
        ("resnet18", "layer3.0.conv1", r"cannot be cut there"),  # the shortcut is read later too
        ("swin_t", "features.3", r"cannot be cut there"),  # channels come last there
    ],
)
def test_what_cannot_be_cut_is_refused(name: str | None, split: str | None, message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        torchvision_model(10, name=name, split=split)


def test_what_cannot_be_traced_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Branching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(3, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            means = images.mean((2, 3))
            return self.fc(means if means.sum() > 0 else -means)

    monkeypatch.setattr(torchvision.models, "get_model", lambda *args, **options: Branching())
    with pytest.raises(
        ConfigError, match=r"model\.name=resnet18: torch\.fx cannot trace it \(.*control flow"
    ):
        torchvision_model(10, name="resnet18", split="fc")
