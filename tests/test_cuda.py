"""What can be shown of CUDA where there is none: no operator of a step touches the host.

Under FakeTensorMode tensors pretend to be on a GPU. It does not notice index tensors and 0-dim tensors on the
CPU, so `OneDevice` looks at every argument itself; it has no CUDA generator, so draws are given; it switches
CUDA's autocast off and does not run backward passes.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from dispatch_watch import OneDevice, needs_pretended_cuda
from method_cases import CASES, overrides_of
from torch._subclasses.fake_tensor import FakeTensorMode

from okddip.data.augment import Draws, Normalization, augment, normalize
from okddip.methods.base import Method
from okddip.models.resnet import resnet
from okddip.training import metrics
from okddip.training.peers import make_group


@needs_pretended_cuda
@pytest.mark.parametrize(("option", "structure"), CASES)
def test_no_step_touches_a_tensor_on_the_host(
    make_method: Callable[..., Method], option: str, structure: str
) -> None:
    with FakeTensorMode(), torch.device("cuda"):
        method = make_method(option, *overrides_of(option, structure))
        make_backbone = partial(resnet, depth=8, num_classes=10)
        teacher = make_backbone() if option == "kd" else None
        group = make_group(make_backbone, method, teacher)
        pixels = torch.zeros(6, 32, 32, 3, dtype=torch.uint8)
        labels = torch.zeros(6, dtype=torch.int64)
        draws = Draws(labels, labels, torch.zeros(6, dtype=torch.bool))
        constants = Normalization(torch.ones(3, 1, 1), torch.zeros(3, 1, 1))
        ramp = torch.ones(())
        with torch.device("cpu"), OneDevice("cuda") as watch:  # what names no device lands on the host
            augmented, plain = augment(pixels, draws, constants, pad=4), normalize(pixels, constants)
            for images, auxiliary in ((augmented, None), (plain, method.auxiliary)):
                losses = method(group(images), labels, ramp)
                batch = metrics.count(losses, labels, auxiliary)
                sums = metrics.accumulate(metrics.accumulate(None, batch), batch)
    assert watch.operators > 100
    assert {value.device.type for value in (*sums.values(), losses.total)} == {"cuda"}


@needs_pretended_cuda
@pytest.mark.parametrize("misplaced", ["index", "scalar"])
def test_the_watch_sees_what_fake_tensors_let_pass(misplaced: str) -> None:
    with FakeTensorMode():
        images = torch.zeros(6, 3, device="cuda")
        host = torch.zeros(2, dtype=torch.int64) if misplaced == "index" else torch.ones(())
        with OneDevice("cuda"), pytest.raises(AssertionError, match="has an argument on cpu"):
            images[host] if misplaced == "index" else images * host
