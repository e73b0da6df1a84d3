"""The device that a setting names."""

import logging
from collections.abc import Callable

import torch

from okddip import distributed
from okddip.errors import ConfigError

log = logging.getLogger(__name__)


def find_device(name: str, choose_gpu: Callable[[int], int | None] = lambda gpus: None) -> torch.device:
    """The device a setting names; `auto` is CUDA if there is one, else the CPU.

    `auto` and `cuda` are different GPUs for ranks, and for the jobs of a sweep that run side by side.

    Args:
        name: auto, cpu, cuda or cuda:N.
        choose_gpu: which of so many GPUs `cuda` is; None leaves it to PyTorch.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return find_device("cuda", choose_gpu)
        log.info("No CUDA device: training on the CPU.")
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"trainer.device={name}: must be auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"trainer.device={name}: must be auto, cpu, cuda or cuda:N.")
    if device.type == "cpu":
        return device
    gpus = torch.cuda.device_count()
    if distributed.world_size() > 1:
        device = device_of_rank(name, device, gpus)
    if (device.index or 0) >= gpus:
        raise ConfigError(
            f"trainer.device={name}: PyTorch sees {gpus} CUDA devices here."
            " Use trainer.device=cpu or trainer.device=auto."
        )
    if device.index is None and (index := choose_gpu(gpus)) is not None:
        device = torch.device("cuda", index)
    if device.index is not None and device != torch.device(name):
        torch.cuda.set_device(device)  # for what names no device, like page-locked memory
    return device


def device_of_rank(name: str, device: torch.device, gpus: int) -> torch.device:
    """The GPU that this rank has for itself.

    Raises:
        ConfigError: one for all is named, or there are fewer than ranks.
    """
    if device.index is not None:
        raise ConfigError(f"trainer.device={name}: each rank takes a device of its own; give cuda.")
    if distributed.local_rank() >= gpus:
        raise ConfigError(
            f"trainer.device={name}: rank {distributed.rank()} finds no device of its own, PyTorch sees"
            f" {gpus}. Start as many processes as there are devices (torchrun --nproc-per-node), or use"
            " trainer.device=cpu."
        )
    return torch.device("cuda", distributed.local_rank())
