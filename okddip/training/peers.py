"""The group of peers that a method asks for, and what the optimizer gets of both."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from okddip.errors import ConfigError
from okddip.methods.base import Method
from okddip.models.backbone import Backbone
from okddip.models.group import PeerGroup


def make_group(
    make_backbone: Callable[[], Backbone] | Sequence[Callable[[], Backbone]],
    method: Method,
    teacher: Backbone | Sequence[Backbone] | None = None,
    **place: Any,
) -> PeerGroup:
    """The group that a method asks for.

    Args:
        make_backbone: see `PeerGroup`.
        method: says how many peers there are, what they share and what it needs of them.
        teacher: see `PeerGroup`; where the group is to be.
        place: for `Module.to`.

    Raises:
        ConfigError: see `PeerGroup`.
    """
    group = PeerGroup(
        make_backbone,
        method.peers,
        method.structure,
        method.rescale,
        teacher,
        maps=method.needs_maps,
    )
    if place:
        group.to(**place)
    if method.ema_decay is not None:
        group.keep_averages(method.ema_decay, in_training=method.needs_averages)
    return group


def saved_parts(group: PeerGroup, method: Method) -> dict[str, nn.Module]:
    """What a checkpoint holds of both, by its key."""
    return {"group": group, "method": method, **({"averages": group.averages[0]} if group.averages else {})}


def parameter_groups(group: PeerGroup, method: Method) -> list[Any]:
    """What the optimizer gets: parameters, or groups of them where the method has its own weight decay.

    Raises:
        ConfigError: the method has a weight decay for what it learns, and learns nothing.
    """
    own = [*method.parameters()]
    if method.weight_decay is None:
        return [*group.parameters(), *own]
    if not own:
        raise ConfigError(
            f"method.weight_decay={method.weight_decay}: is for what the method itself learns, and this one"
            " learns nothing beside its peers. Theirs is optimizer.weight_decay."
        )
    return [{"params": [*group.parameters()]}, {"params": own, "weight_decay": method.weight_decay}]
