"""Any classification network of torchvision that torch.fx can trace and cut."""

import difflib
import operator
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torchvision
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp

from okddip.errors import ConfigError
from okddip.models.backbone import Backbone

PROBE_SIZE = 224  # height and width, in pixels, at which the shapes inside a network are found


def torchvision_model(
    num_classes: int, in_channels: int = 3, *, name: str | None, split: str | None
) -> Backbone:
    """Build a classification network of torchvision, untrained, and cut it after a module.

    Weights are never downloaded.

    Args:
        num_classes: K.
        in_channels: C; a number other than 3 replaces the first convolution.
        name: torchvision's name of the network, as `torchvision.models.list_models` has it.
        split: the module with which the trunk ends, such as `layer3` or `features.5`. What comes after it
            may read nothing but its output, which is [B, c, h, w].

    Raises:
        ConfigError: torchvision has no such network; it cannot be cut (it has auxiliary outputs, cannot be
            traced, or does not end in a linear layer); or it cannot be cut at `split`.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if name is None or name not in names:
        near = difflib.get_close_matches(str(name or ""), names, n=6, cutoff=0.4)
        raise ConfigError(
            f"model.name={name}: torchvision has no classification model of this name; "
            + (f"near names: {', '.join(near)}." if near else f"it has {', '.join(names)}.")
        )
    model = build(name, num_classes)
    if getattr(model, "aux_logits", False):
        raise ConfigError(
            f"model.name={name}: has auxiliary outputs while training, which peers do not support. "
            "Choose another model."
        )
    if in_channels != 3:
        replace_stem(model, in_channels)
    graph = trace(model, name, in_channels)

    nodes = [node for node in graph.nodes if node.op != "output"]  # in the order in which they run
    classifier = model.get_submodule(nodes[-1].target) if nodes[-1].op == "call_module" else None
    features = nodes[-2]
    if not isinstance(classifier, nn.Linear) or len(shape(features)) != 2:
        raise ConfigError(
            f"model.name={name}: does not end in a linear layer over one feature vector per image, "
            "which is what each peer needs as its classifier. Choose another model."
        )
    cuts = allowed_cuts(nodes)
    if not cuts:
        raise ConfigError(
            f"model.name={name}: no module of it gives an image [B, c, h, w] that is all that later modules "
            "read, so peers cannot share its early stages. Choose another model."
        )
    if split is None or split not in cuts:
        outer = [path for path in cuts if path.count(".") <= 1]
        raise ConfigError(
            f"model.split={split}: {name} cannot be cut there. It can after {', '.join(outer)}"
            + (", and after parts of these." if len(outer) < len(cuts) else ".")
        )

    end = cuts[split]
    index = nodes.index(end)
    trunk = part(model, nodes[0], nodes[1 : index + 1])
    later = nodes[index + 1 : -1]
    maps = last_maps([end, *later])
    first = later.index(maps) + 1 if maps in later else 0  # after the feature maps
    stage, pool = part(model, end, later[:first]), part(model, maps, later[first:])
    for graph_module in (stage, pool):
        make_out_of_place(graph_module)
    return Backbone(
        trunk,
        TracedHead(OrderedDict(maps=stage, pool=pool)),
        classifier,
        feature_dim=classifier.in_features,
        trunk_channels=shape(end)[1],
        map_channels=shape(maps)[1],
    )


class TracedHead(nn.Sequential):
    """A head in two parts, up to the last feature maps and after them; reads weights of heads of one part."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *details: Any) -> None:
        for name, part in self.named_children():
            for key in part.state_dict():
                if f"{prefix}{key}" in state_dict:
                    state_dict[f"{prefix}{name}.{key}"] = state_dict.pop(f"{prefix}{key}")
        super()._load_from_state_dict(state_dict, prefix, *details)


def build(name: str, num_classes: int) -> nn.Module:
    """Build a network of torchvision without weights, on the default device."""
    make = partial(torchvision.models.get_model, name, weights=None, num_classes=num_classes)
    # two networks, which are refused later, warn about future initial weights
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        try:
            return make()
        except NotImplementedError:
            # RegNets calculate their widths with tensors, which the meta device cannot
            device = torch.get_default_device()
            with torch.device("cpu"):
                return make().to(device)


class Tracer(fx.Tracer):
    """Does not trace into modules whose forward reads `training`: its value would become a constant."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return super().is_leaf_module(module, path) or "training" in type(module).forward.__code__.co_names


def trace(model: nn.Module, name: str, in_channels: int) -> fx.Graph:
    """Trace a network and note the shape of each value in it.

    Raises:
        ConfigError: the network cannot be traced, or does not take images of `PROBE_SIZE`.
    """
    device = next(model.parameters()).device
    try:
        graph = Tracer().trace(model)
        with FakeTensorMode() as mode:
            images = torch.empty(2, in_channels, PROBE_SIZE, PROBE_SIZE, device=device)
        ShapeProp(fx.GraphModule(model, graph), mode).propagate(images)
    except Exception as error:  # a model's own code fails under tracing in any way
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"model.name={name}: torch.fx cannot trace it ({reason}). Choose another model."
        ) from error
    return graph


def allowed_cuts(nodes: Sequence[fx.Node]) -> dict[str, fx.Node]:
    """Map the path of each module after which the network can be cut to the node that is its output.

    The output must be an image-like tensor, and the only value that later nodes read.
    """
    position = {node: i for i, node in enumerate(nodes)}
    last_use = {
        node: max((position[user] for user in node.users if user in position), default=-1) for node in nodes
    }
    outputs = {
        path: node for node in nodes for path, _ in node.meta.get("nn_module_stack", {}).values() if path
    }
    cuts = {}
    for path, node in outputs.items():
        read_later = [n for n in nodes[: position[node] + 1] if last_use[n] > position[node]]
        if read_later == [node] and is_image(shape(node)):
            cuts[path] = node
    return cuts


def last_maps(nodes: Sequence[fx.Node]) -> fx.Node:
    """The last image of more than one pixel that is all that later nodes read; the first value if none is."""
    position = {node: i for i, node in enumerate(nodes)}
    last_use = {
        node: max((position[user] for user in node.users if user in position), default=-1) for node in nodes
    }
    for i in range(len(nodes) - 1, 0, -1):
        alone = all(last_use[node] <= i for node in nodes[:i])
        if alone and is_image(shape(nodes[i])) and shape(nodes[i])[2] > 1:
            return nodes[i]
    return nodes[0]


def shape(node: fx.Node) -> Sequence[int]:
    """The shape of a node's value, empty if that is not a tensor."""
    return getattr(node.meta.get("tensor_meta"), "shape", ())


def is_image(shape: Sequence[int]) -> bool:
    """Whether a shape is [B, c, h, w] and not [B, h, w, c], as in Swin: the probe is square."""
    return len(shape) == 4 and shape[2] == shape[3]


def part(model: nn.Module, start: fx.Node, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """Cut out the computation from the value of `start` to the value of the last of `nodes`."""
    graph = fx.Graph()
    copies = {start: graph.placeholder("x")}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[nodes[-1] if nodes else start])
    return fx.GraphModule(model, graph)


def make_out_of_place(head: fx.GraphModule) -> None:
    """Keep a head from writing to its input: torchvision's may begin with an in-place ReLU or addition."""
    for module in head.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]  # a plain attribute
    for node in head.graph.nodes:
        if "inplace" in node.kwargs:
            node.update_kwarg("inplace", False)
        if node.target in (operator.iadd, operator.imul):
            node.target = operator.add if node.target is operator.iadd else operator.mul
    head.recompile()


def replace_stem(model: nn.Module, in_channels: int) -> None:
    """Replace the first convolution by one over `in_channels` channels, initialised by He's fan-out."""
    path, old = next((path, part) for path, part in model.named_modules() if isinstance(part, nn.Conv2d))
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    model.set_submodule(path, new)
