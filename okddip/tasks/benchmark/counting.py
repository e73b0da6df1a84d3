"""How many operators and host reads a call makes, how many operations and how much memory a step takes."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from okddip.tasks.benchmark.device_use import peak_memory
from okddip.tasks.benchmark.steps import TrainerSteps
from okddip.tasks.benchmark.timing import set_mode
from okddip.training.peers import saved_parts
from okddip.training.trainer import GRAPH_MODES

aten = torch.ops.aten
VALUE_READS = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__)
ALLOCATIONS = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)
HOST_READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal)


def count_flops(steps: TrainerSteps, modules: Sequence[nn.Module]) -> int:
    """Floating-point operations of the convolutions and matrix products of a training step."""
    set_mode(modules, training=True)
    with FlopCounterMode(display=False, custom_mapping=GROUPED) as counter:
        steps.train_step()
    return counter.get_total_flops()


def convolution_backward_flops(
    grad_shape: Sequence[int], x_shape: Sequence[int], w_shape: Sequence[int], *rest: Any, **_: Any
) -> int:
    """Each of the two gradients of a convolution takes as many operations as its forward pass.

    PyTorch's own formula counts the gradient of the weights of a grouped convolution as if it had no groups.
    """
    transposed, _, _, output_mask = rest[-4:]  # as of aten.convolution_backward
    return conv_flop_count(list(x_shape), list(w_shape), list(grad_shape), transposed) * sum(output_mask[:2])


GROUPED = {aten.convolution_backward: convolution_backward_flops}


class ByteCounter(TorchDispatchMode):
    """Counts the bytes that operators read and write in memory, as if each read all of its arguments once."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        is_view = any(part.alias_info and not part.alias_info.is_write for part in schema.returns)
        if is_view or func.overloadpacket in ALLOCATIONS:
            return result
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | (
            kwargs or {}
        )
        self.total += size_of(given)
        for argument in schema.arguments:  # in place
            if argument.alias_info and argument.alias_info.is_write:
                self.total += size_of(given.get(argument.name))
        results = result if isinstance(result, tuple) else (result,)
        for part, value in zip(schema.returns, results, strict=False):
            if part.alias_info is None:
                self.total += size_of(value)
        return result


def size_of(values: Any) -> int:
    """Bytes of the tensors in nested containers; what an expanded tensor repeats is there once."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)


def count_bytes(steps: TrainerSteps, modules: Sequence[nn.Module]) -> int:
    """Bytes that the operators of a training step read and write; see `ByteCounter`."""
    set_mode(modules, training=True)
    with ByteCounter() as counter:
        steps.train_step()
    return counter.total


class ValueReads(TorchFunctionMode):
    """Lists calls that read a tensor on the host without an operator where it lies on the CPU."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in VALUE_READS:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class OperatorCounter(TorchDispatchMode):
    """Counts operators, and reads for which the host waits for a device or which copy between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.detaches = 0
        self.found: list[str] = []  # the reads
        self.values = ValueReads(self.found)

    def __enter__(self) -> "OperatorCounter":
        self.values.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.values.__exit__(*error)

    @property
    def host_reads(self) -> int:
        return len(self.found)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        self.total += 1
        self.detaches += packet is aten.detach
        devices = {leaf.device for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        masked = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in tree_leaves(args[1])
        )
        if packet in HOST_READS or masked or len(devices) > 1:
            self.found.append(str(func))
        return result


def count_operators(
    run: Callable[[], object], modules: Sequence[nn.Module], *, training: bool
) -> dict[str, int]:
    """Operators, detaches among them, and host reads of a call that is not the first."""
    set_mode(modules, training=training)
    run()
    with OperatorCounter() as operators:
        run()
    return {
        "operators": operators.total,
        "detaches": operators.detaches,
        "host_reads": operators.host_reads,
    }


def memory_use(steps: TrainerSteps) -> dict[str, int]:
    """Bytes of parameters, buffers, averages, teachers and the optimizer's state, and the most a step adds.

    Both count tensors alone. What a step adds is read from PyTorch's allocator: on CUDA its peak, on the CPU
    the profiler's record of allocations. Memory that libraries allocate themselves is not counted. CUDA
    graphs have taken their memory before: what their step adds is left out.
    """
    set_mode([steps.group, steps.method], training=True)
    modules = [*saved_parts(steps.group, steps.method).values(), *steps.group.teacher]
    kept = [x for module in modules for x in module.state_dict().values() if isinstance(x, Tensor)]
    kept += [x for state in steps.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    device = steps.trainer.device
    batch = steps.next_batch()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        steps.update(*batch)
        added = torch.cuda.max_memory_allocated(device) - before
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports that there is no GPU
        with profile(profile_memory=True) as profiler:
            steps.update(*batch)
        events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        now = added = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            added = max(added, now)
    size = {"model_bytes": sum(tensor.nbytes for tensor in kept), **peak_memory(device)}
    if device.type == "cuda" and steps.trainer.compile and steps.trainer.compile_mode in GRAPH_MODES:
        return size
    return {**size, "step_bytes": added}
