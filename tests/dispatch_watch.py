"""A dispatch mode that watches where tensors live."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
