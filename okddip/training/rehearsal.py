"""What is tried before a run begins, so that models that cannot work are refused by name."""

import contextlib
import copy
import io
import os
from collections.abc import Mapping

import torch

from okddip.errors import Incompatible
from okddip.methods.base import Method
from okddip.models.backbone import Backbone
from okddip.models.group import PeerGroup
from okddip.outputs import GroupOutput

BATCH = 2  # the least that batch norm takes in training


def check_image_size(probe: Backbone, size: tuple[int, int], options: Mapping[str, str]) -> None:
    """Refuse images that are too small for the model.

    Args:
        probe: the model.
        size: (height, width) of the images.
        options: what `model` and `dataset` are called, for the message.

    Raises:
        Incompatible: names both.
    """
    if min(size) < probe.minimum_size:
        raise Incompatible(
            f"model={options['model']}: takes images of at least {probe.minimum_size} pixels a side, and"
            f" those of dataset={options['dataset']} have {'x'.join(map(str, size))}."
            " Choose another model, or set dataset.image_size where the data set has it."
        )


def check_memory(backbone: Backbone, method: Method, device: torch.device, name: str) -> None:
    """Refuse a group whose weights and gradients alone take more memory than there is.

    Args:
        backbone: one network of the kind; may be on the meta device.
        name: of the model, for the message.

    Raises:
        Incompatible: names the model and the number of peers.
    """
    shared = sum(p.numel() for p in backbone.trunk.parameters()) if method.structure == "branch" else 0
    own = sum(p.numel() for p in backbone.parameters()) - shared
    needed = 2 * 4 * (shared + method.peers * own)  # bytes
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise Incompatible(
            f"method.peers={method.peers}: so many of model={name} ({method.structure}) need"
            f" {needed / 2**30:.0f} GiB for weights and gradients alone; {device} has {memory / 2**30:.0f}."
        )


@torch.no_grad()
def rehearse(group: PeerGroup, method: Method, shape: tuple[int, int, int], names: str) -> None:
    """Send a batch of two images through a group and its method, and forget it.

    The group runs on the meta device, which knows shapes and calculates nothing, and the method on zeros of
    the shapes that come out.

    Args:
        group: with its teacher, if it has one; left as it is, as are random state and batch statistics.
        method: left as it is.
        shape: (C, H, W) of the images.
        names: of model and data set, for the message.

    Raises:
        Incompatible: the model, or the teacher, cannot take images of this shape.
    """
    device = next(group.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), contextlib.redirect_stderr(io.StringIO()):  # torch.fx talks
        try:
            try:
                with torch.device("meta"):  # a model may make tensors of its own
                    output = copy_to_meta_device(group).train()(torch.zeros(BATCH, *shape))
            except Exception:  # is it the images, or code that the meta device cannot run?
                output = copy.deepcopy(group).train()(torch.zeros(BATCH, *shape, device=device))
        except Exception as error:  # a model's own code may raise anything
            channels, height, width = shape
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Incompatible(
                f"{names}: the model cannot take images of {channels}x{height}x{width} ({reason})."
                " Choose another model, or set dataset.image_size where the data set has it."
            ) from error
    output = GroupOutput._make(
        None if part is None else torch.zeros_like(part, device=device) for part in output
    )
    with torch.random.fork_rng(devices=cuda):
        labels = torch.zeros(BATCH, dtype=torch.long, device=device)
        copy.deepcopy(method).train()(output, labels, torch.ones((), device=device))


def copy_to_meta_device(group: PeerGroup) -> PeerGroup:
    """Copy a group onto the meta device, with no copy of its parameters and buffers on the way."""
    tensors = [t for module in (group, *group.teacher) for t in (*module.parameters(), *module.buffers())]
    empty = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
    return copy.deepcopy(group, empty)
