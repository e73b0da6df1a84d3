"""Dispatch modes that watch where tensors live and when the host waits for them."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from okddip.measure import ReadsOfValues

aten = torch.ops.aten


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


class HostReads(TorchDispatchMode):
    """Lists operators for which the host would wait for the device, or which move data between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operators = 0
        self.values = ReadsOfValues()

    def __enter__(self) -> "HostReads":
        self.values.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.values.__exit__(*error)
        self.found += ["a read of values"] * self.values.number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if packet in (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal):
            self.found.append(str(func))
        if packet in (aten.index, aten.index_put, aten.index_put_):
            indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, torch.Tensor)]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.found.append(f"{func} with a mask")
        devices = {leaf.device for leaf in [*tensors, *tree_leaves(result)] if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1:
            self.found.append(f"{func} between {devices}")
        return result
