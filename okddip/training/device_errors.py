"""PyTorch's errors of a device, said in the settings that are behind them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from okddip.errors import ConfigError
from okddip.training.devices import first_sentence

# of libraries, beside what PyTorch's allocator raises
MEMORY_FULL = re.compile(
    r"CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|unable to find an engine to execute this computation",  # cuDNN, where none gets its workspace
    re.IGNORECASE,
)
NOT_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")
CUBLAS_SET_UP = re.compile(r"this operation is not deterministic because it uses CuBLAS", re.IGNORECASE)


@contextmanager
def named_errors(
    device: torch.device, *, batch_size: int, eval_batch_size: int, accumulate: int
) -> Iterator[None]:
    """Name the settings behind what PyTorch cannot do with a batch.

    Args:
        device, batch_size, eval_batch_size, accumulate: settings of the trainer, for the messages.

    Raises:
        ConfigError: the device's memory is full, or an operator is not deterministic and has to be.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or MEMORY_FULL.search(str(error)):
            raise ConfigError(
                f"trainer.batch_size={batch_size}, trainer.eval_batch_size={eval_batch_size}:"
                f" the memory of {device} is full ({first_sentence(error)}). Take smaller batches,"
                f" trainer.accumulate={2 * accumulate} for the same updates in smaller parts, or"
                " trainer.precision=bf16."
            ) from error
        if operator := NOT_DETERMINISTIC.match(str(error)):
            raise ConfigError(
                f"trainer.deterministic=true: PyTorch's {operator[1]} has no deterministic form on"
                f" {device}. Choose another model or method, or trainer.deterministic=false."
            ) from error
        if CUBLAS_SET_UP.search(str(error)):  # this process had used it before the run asked for its memory
            raise ConfigError(
                "trainer.deterministic=true: cuBLAS was set up without it. Set the environment variable"
                " CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts."
            ) from error
        raise
