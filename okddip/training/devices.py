"""The device that a setting names."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from okddip import distributed
from okddip.errors import ConfigError
from okddip.text import ONCE

log = logging.getLogger(__name__)

BETTER_MATCH = "Update the driver, or install a PyTorch that was built for this one (see pytorch.org)."


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
        reason = why_no_cuda()
        if "too old" in reason:  # there is a GPU, and the user would want it used
            log.warning("No CUDA device (%s): training on the CPU.", reason, extra=ONCE)
        else:
            log.info("No CUDA device: on the CPU.", extra=ONCE)
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
        reason = "" if gpus else why_no_cuda()
        raise ConfigError(
            f"trainer.device={name}: PyTorch sees {gpus} CUDA devices here{f' ({reason})' if reason else ''}."
            + (f" {BETTER_MATCH}" if "too old" in reason else "")
            + " Use trainer.device=cpu or trainer.device=auto."
        )
    if device.index is None and (index := choose_gpu(gpus)) is not None:
        device = torch.device("cuda", index)
    if device.index is not None:
        with refused(device):
            torch.cuda.set_device(device)  # for what names no device: page-locked memory, events, streams
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


def why_no_cuda() -> str:
    """What PyTorch says of a machine where it sees no CUDA device: no driver, or one that is too old."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the latter of a PyTorch without CUDA
        return first_sentence(error)
    return ""


def check_device(device: torch.device) -> None:
    """Refuse a GPU that is there and cannot be used, before any data is read.

    Another process may have taken all of its memory, or all of it for itself, and this PyTorch may have no
    code for so old or new a GPU.

    Raises:
        ConfigError: says what PyTorch says.
    """
    if device.type == "cuda":
        with refused(device):
            torch.zeros(1, device=device).add_(1).item()


@contextmanager
def refused(device: torch.device) -> Iterator[None]:
    """Say which device it is that PyTorch cannot use.

    Raises:
        ConfigError: says what PyTorch says.
    """
    try:
        yield
    except RuntimeError as error:
        reason = first_sentence(error)
        what_to_do = (
            f"{BETTER_MATCH} Or use trainer.device=cpu."
            if "too old" in reason  # PyTorch counts GPUs before it asks for the driver's age
            else "See with nvidia-smi which processes are on it, or choose another by trainer.device or"
            " CUDA_VISIBLE_DEVICES."
        )
        raise ConfigError(f"trainer.device={device}: cannot be used ({reason}). {what_to_do}") from error


def first_sentence(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
