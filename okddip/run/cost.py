"""What a run says of its cost and of whose accuracy it reports: tags that tables compare runs by."""

from statistics import mean

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from okddip.deployment.predictors import exportable_predictors, extract
from okddip.methods.base import Method
from okddip.models.group import PeerGroup

PREDICTOR = "predictor"  # the primary one: `final/top1` is its
TRAINED = "parameters.trained"  # of all peers and of what the method learns
KEPT = "parameters.kept"  # of the network, or of the ensemble, whose accuracy is reported
FLOPS = "flops.kept"  # of its forward pass for one image


def cost_tags(group: PeerGroup, method: Method, shape: tuple[int, int, int]) -> dict[str, str]:
    """Whose accuracy a run reports, what is trained for it, and what is kept: tags of the MLflow run.

    Where the mean of several networks is reported, one of them is kept: where they differ, it costs what they
    cost on average. A multiplication and an addition are two operations; there is no tag where the network's
    code cannot be followed without arithmetic.

    Args:
        group: of the run; left as it is.
        method: of the run.
        shape: (C, H, W) of the images.
    """
    trained = sum(p.numel() for module in (group, method) for p in module.parameters() if p.requires_grad)
    peers = method.averaged if method.primary == "ema/mean" else method.predictors
    if method.primary in exportable_predictors(method):
        names = [method.primary]
    elif len(set(map(weights_of, group.peers))) > 1:
        names = list(peers[: method.auxiliary])
    else:
        names = [peers[method.kept]]
    networks = [extract(group, method, name) for name in names]
    tags = {
        PREDICTOR: method.primary,
        TRAINED: str(trained),
        KEPT: str(round(mean(map(weights_of, networks)))),
    }
    flops = [forward_flops(network, shape) for network in networks]
    known = [count for count in flops if count is not None]
    return {**tags, FLOPS: str(round(mean(known)))} if len(known) == len(networks) else tags


def weights_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def forward_flops(network: nn.Module, shape: tuple[int, int, int]) -> int | None:
    """Floating-point operations of the convolutions and matrix products for one image.

    Args:
        network: images [B, C, H, W] to logits; is moved to the meta device, which calculates nothing.
        shape: (C, H, W).

    Returns:
        None if the network's code cannot be run there.
    """
    try:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            network.to("meta").eval()(torch.zeros(1, *shape))
    except Exception:  # somebody's own network may do anything
        return None
    return counter.get_total_flops()
