"""A dispatch mode that watches where tensors live."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FIRST_WITHOUT_DRIVER = (2, 14)  # release of PyTorch that is known to pretend without the driver of CUDA


def pretends_cuda() -> bool:
    """Whether tensors can pretend to be on a GPU here. PyTorch 2.9 asks the driver even then."""
    if tuple(map(int, torch.__version__.split(".")[:2])) >= FIRST_WITHOUT_DRIVER:
        return True
    try:
        with FakeTensorMode():
            torch.empty(1, device="cuda").uniform_()
    except RuntimeError:
        return False
    return True


needs_pretended_cuda = pytest.mark.skipif(
    not pretends_cuda(), reason=f"PyTorch {torch.__version__} pretends to be on CUDA only where its driver is"
)


class OneDevice(TorchDispatchMode):
    """Every tensor that goes into or comes out of an operator is on the given type of device."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                assert leaf.device.type == self.device_type, f"{func} has an argument on {leaf.device}"
        return result
