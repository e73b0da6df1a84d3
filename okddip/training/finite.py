"""Weights that are not finite, of a training that has failed: found before they are put to any use."""

from torch import nn
from torch.optim import Optimizer

MOST_NAMES = 3  # in a message


def not_finite(part: object) -> str:
    """Names of the tensors of a module or an optimizer that hold what they must not; empty if there are none.

    Parameters must be finite. A buffer may hold infinity (a mask, say) and no NaN, as may what an optimizer
    keeps: its squares of gradients overflow in runs that go well. Other objects have no such tensors.
    """
    names: list[str] = []
    if isinstance(part, nn.Module):
        names += [name for name, parameter in part.named_parameters() if not parameter.isfinite().all()]
        names += [name for name, buffer in part.named_buffers() if buffer.isnan().any()]
    elif isinstance(part, Optimizer):
        kept = [(name, tensor) for state in part.state.values() for name, tensor in state.items()]
        names += [name for name, tensor in kept if hasattr(tensor, "isnan") and tensor.isnan().any()]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
