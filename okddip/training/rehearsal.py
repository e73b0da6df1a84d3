"""What is tried before a run begins, so that models that cannot work are refused by name."""

import contextlib
import copy
import io
import os
from collections.abc import Sequence

import torch

from okddip.errors import ConfigError, Incompatible
from okddip.methods.base import Method
from okddip.models.backbone import Backbone
from okddip.models.group import PeerGroup
from okddip.outputs import GroupOutput

BATCH = 2  # the least that batch norm takes in training


def check_image_size(
    probes: Sequence[Backbone], models: Sequence[str], size: tuple[int, int], dataset: str
) -> None:
    """Refuse images that are too small for a model.

    Args:
        probes: a network of each model.
        models: what they are called, for the message.
        size: (height, width) of the images.
        dataset: what the data set is called.

    Raises:
        Incompatible: names both.
    """
    for probe, model in zip(probes, models, strict=True):
        if min(size) < probe.minimum_size:
            raise Incompatible(
                f"model={model}: takes images of at least {probe.minimum_size} pixels a side, and"
                f" those of dataset={dataset} have {'x'.join(map(str, size))}."
                " Choose another model, or set dataset.image_size where the data set has it."
            )


def check_memory(backbones: Sequence[Backbone], method: Method, device: torch.device, name: str) -> None:
    """Refuse a group whose weights, gradients and moving averages alone take more memory than there is.

    Args:
        backbones: one network for all peers, or one for each; may be on the meta device.
        name: of the model, for the message.

    Raises:
        Incompatible: names the model and the number of peers.
    """
    trunk = backbones[0].trunk if method.structure == "branch" else None
    shared = 0 if trunk is None else sum(p.numel() for p in trunk.parameters())
    sizes = [sum(p.numel() for p in backbone.parameters()) - shared for backbone in backbones]
    own = sum(sizes) if len(sizes) > 1 else method.peers * sizes[0]
    tensors = "weights and gradients" if method.ema_decay is None else "weights, gradients and averages"
    needed = (2 if method.ema_decay is None else 3) * 4 * (shared + own)  # bytes
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise Incompatible(
            f"method.peers={method.peers}: so many of model={name} ({method.structure}) need"
            f" {needed / 2**30:.0f} GiB for {tensors} alone; {device} has {memory / 2**30:.0f}."
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
        ConfigError: the method's predictions are not those that it names.
    """
    device = next(group.parameters()).device
    size = (BATCH, *shape) if method.views == 1 else (BATCH, method.views, *shape)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), contextlib.redirect_stderr(io.StringIO()):  # torch.fx talks
        try:
            try:
                with torch.device("meta"):  # a model may make tensors of its own
                    output = copy_to_meta_device(group).train()(torch.zeros(size))
            except Exception:  # is it the images, or code that the meta device cannot run?
                output = copy.deepcopy(group).train()(torch.zeros(size, device=device))
        except ConfigError:  # which says what is wrong itself
            raise
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
        losses = copy.deepcopy(method).train()(output, labels, torch.ones((), device=device))
    named = method.predictors if output.averages is None else method.measured
    if len(losses.predictions) != len(named):
        raise ConfigError(
            f"method: {type(method).__name__}.losses returns the predictions of {len(losses.predictions)}"
            f" predictors, and there are {len(named)}: {', '.join(named)}. Return the logits of all that"
            " `predictors` names, in that order; those of moving averages are added to them."
        )


def copy_to_meta_device(group: PeerGroup) -> PeerGroup:
    """Copy a group onto the meta device, with no copy of its parameters and buffers on the way."""
    tensors = [
        t
        for module in (group, *group.teacher, *group.averages)
        for t in (*module.parameters(), *module.buffers())
    ]
    empty = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
    return copy.deepcopy(group, empty)
