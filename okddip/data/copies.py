"""Copies of batches from the host's memory to the device."""

import torch
from torch import Tensor


class DeviceCopies:
    """Copies batches to a device; to CUDA on a stream of their own, beside the step that the device works on.

    The host waits for none of them. What the caller does with a copy, on the current stream, begins when the
    copy is there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Copies of the tensors, which lie in page-locked memory where the device is a GPU."""
        if self.stream is None:
            return [tensor.to(self.device) for tensor in tensors]
        with torch.cuda.stream(self.stream):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        using = torch.cuda.current_stream(self.device)
        using.wait_stream(self.stream)
        for copy in copies:
            copy.record_stream(using)  # else the next copy could take its memory before it has been used
        return copies
