"""With how many threads of the CPU a task computes what is built."""

from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from okddip import distributed
from okddip.run.parts import Parts
from okddip.sweeps.joblib import is_side_by_side
from okddip.training.threads import default_threads, step_flops


def choose_threads(config: DictConfig, parts: Parts, state: dict[str, Any] | None) -> None:
    """Settle with how many threads of the CPU a run computes, and write it into its configuration.

    The count that the command names; else that with which the run began, if it goes on from a checkpoint. One
    of an older version does not say it and goes on with PyTorch's choice. On CUDA it is PyTorch's too, and is
    not told: results do not depend on it.

    Args:
        config: of the task.
        parts: what it was built into.
        state: the checkpoint that a run goes on from.
    """
    trainer, dataset = parts.trainer, parts.dataset
    if trainer.threads is None and trainer.device.type == "cpu":
        if state is not None:
            trainer.threads = state["config"]["trainer"].get("threads") or torch.get_num_threads()
        else:
            shape = (dataset.channels, *dataset.image_size)
            images = trainer.batch_size // distributed.world_size()
            count = partial(step_flops, parts.group, shape, images)
            trainer.threads = default_threads(count, side_by_side=is_side_by_side())
    OmegaConf.update(config, "trainer.threads", trainer.threads, force_add=True)
