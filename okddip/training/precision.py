"""In which type of numbers a group computes, and which of them the device computes fast."""

import torch

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def auto_precision(device_type: str) -> str:
    """What `trainer.precision=auto` is on a device."""
    return "bf16" if device_type == "cuda" else "fp32"


def is_native(precision: str, device: torch.device) -> bool:
    """Whether the device has instructions for products in this precision; without them they are emulated."""
    if device.type != "cpu" or precision == "fp32" or not torch.backends.mkldnn.is_available():
        return True
    supported = {
        "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return bool(supported[precision]())
