"""Moving averages of the weights of peers."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class MovingAverages(nn.Module):
    """A copy of a group whose weights are moving averages of the group's, in eval mode.

    The decay is min(1 - 1 / (step + 1), `decay`) in the 0-based step: the plain mean of all steps, until the
    average is as long as `decay` says. Running statistics of batch norm are averaged like the weights.

    Args:
        group: what is averaged.
        decay: the largest, in [0, 1).
    """

    def __init__(self, group: nn.Module, decay: float) -> None:
        super().__init__()
        # tensors that only pretend to be on a device cannot be deep-copied
        copies: dict[int, Any] = {id(buffer): buffer.clone() for buffer in group.buffers()}
        copies |= {id(weight): nn.Parameter(weight.detach().clone()) for weight in group.parameters()}
        self.group = copy.deepcopy(group, copies).eval().requires_grad_(False)
        self.decay = decay
        self.step = 0  # on the host, which then reads nothing from the device

    @torch.no_grad()
    def update(self, group: nn.Module) -> None:
        """Move the averages towards the weights that an optimizer's step has left."""
        averages, weights = tensors(self.group), tensors(group)
        floats = [i for i, average in enumerate(averages) if average.is_floating_point()]
        for i in set(range(len(averages))) - set(floats):  # counters
            averages[i].copy_(weights[i])
        weight = max(1 / (self.step + 1), 1 - self.decay)
        torch._foreach_lerp_([averages[i] for i in floats], [weights[i] for i in floats], weight)
        self.step += 1

    def get_extra_state(self) -> int:
        return self.step

    def set_extra_state(self, state: int) -> None:
        if not isinstance(state, int) or state < 0:
            raise ValueError(f"averages cannot be of {str(state)[:80]} steps")
        self.step = state


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
