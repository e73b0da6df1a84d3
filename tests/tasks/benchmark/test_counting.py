"""Operators and host reads of steps, and how they are counted."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from okddip.assembly import CONFIG_HOME
from okddip.main import build
from okddip.run.parts import Parts
from okddip.tasks.benchmark.counting import GROUPED, OperatorCounter, count_operators, memory_use
from okddip.tasks.benchmark.steps import TrainerSteps
from okddip.tasks.benchmark.synthetic import DataShape, with_synthetic_images

BuildParts = Callable[..., Parts]

METHODS = sorted(path.stem for path in (CONFIG_HOME / "conf" / "method").glob("*.yaml"))
CASES = [  # kd needs a teacher, see test_benchmark.py; the gate of ONE needs a shared trunk
    (method, structure)
    for method in METHODS
    for structure in ("branch", "network")
    if method != "kd" and (method, structure) != ("one", "network")
]


def test_a_training_step_takes_at_most_a_thousand_operators(synthetic_parts: BuildParts) -> None:
    built = synthetic_parts("trainer.batch_size=8", "trainer.precision=fp32")
    step = count_operators(TrainerSteps(built).train_step, [built.group, built.method], training=True)
    assert step["operators"] - step["detaches"] <= 1000


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("option", "structure"), CASES)
def test_no_step_reads_back_from_the_device(
    synthetic_parts: BuildParts, option: str, structure: str, precision: str
) -> None:
    overrides = [f"method={option}", f"method.structure={structure}", f"trainer.precision={precision}"]
    if option == "cl_ilr":
        overrides.append(f"method.rescale={str(structure == 'branch').lower()}")
    built = synthetic_parts(*overrides, "model=resnet8", "trainer.batch_size=8", "trainer.eval_batch_size=8")
    steps = TrainerSteps(built)
    modules = [built.group, built.method]
    for training, run in (
        (True, steps.train_step),
        (False, lambda: steps.evaluate_batches(steps.eval_loader.batches())),
    ):
        counted = count_operators(run, modules, training=training)
        assert counted["operators"] > 50
        assert counted["host_reads"] == 0


@pytest.mark.parametrize("overrides", [[], ["trainer.gradient_clip=1"], ["optimizer=adamw"]])
def test_no_scaled_step_of_a_fused_optimizer_reads_back(
    synthetic_parts: BuildParts, overrides: list[str]
) -> None:
    built = synthetic_parts("trainer.precision=fp16", "model=resnet8", "trainer.batch_size=8", *overrides)
    assert (
        count_operators(TrainerSteps(built).train_step, [built.group, built.method], training=True)[
            "host_reads"
        ]
        == 0
    )


@pytest.mark.parametrize("convolution", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("of_input", [True, False])
def test_each_gradient_of_a_convolution_costs_what_its_forward_pass_does(
    convolution: type[nn.Conv2d], groups: int, of_input: bool
) -> None:
    layer = convolution(16, 32, 3, groups=groups, bias=False)
    images = torch.randn(2, 16, 8, 8, requires_grad=of_input)
    with FlopCounterMode(display=False) as forward:
        output = layer(images)
    counts = []
    for mapping in (GROUPED, {}):
        with FlopCounterMode(display=False, custom_mapping=mapping) as backward:
            output.sum().backward(retain_graph=True)
        counts.append(backward.get_total_flops())
    assert counts[0] == forward.get_total_flops() * (2 if of_input else 1)
    assert (counts[0] == counts[1]) == (groups == 1)  # else PyTorch's own count is another


def test_moving_averages_count_as_memory(synthetic_parts: BuildParts) -> None:
    overrides = ("method=independent", "model=resnet8", "trainer.batch_size=8", "trainer.precision=fp32")
    alone, averaged = (
        memory_use(TrainerSteps(synthetic_parts(*overrides, f"method.ema_decay={decay}")))["model_bytes"]
        for decay in ("null", "0.9")
    )
    group = synthetic_parts(*overrides).group
    assert averaged - alone == sum(tensor.nbytes for tensor in group.state_dict().values())


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_networks_work_in_the_memory_format_that_is_asked_for(
    configured: Callable[..., DictConfig], channels: int, channels_last: bool
) -> None:
    config = configured("tracking=none", "trainer.device=cpu", "model=resnet8", "trainer.batch_size=8")
    config.trainer.channels_last = channels_last
    built = build(with_synthetic_images(config, DataShape((8, 8), channels, 10), {}))
    steps = TrainerSteps(built)
    formats = set()
    for module in built.group.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: formats.add(output.stride(1) == 1))
    steps.train_step()
    steps.evaluate()
    assert formats == {channels_last}


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.any()), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.masked_select(x > 0), 1),
        (lambda x: x.to("meta"), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.numpy(), 1),
        (lambda x: np.asarray(x), 1),
        (lambda x: x[torch.tensor([0, 2])], 0),
        (lambda x: torch.where(x > 0, x, 0), 0),
    ],
)
def test_host_reads_are_counted(read: Callable[[Tensor], object], expected: int) -> None:
    with OperatorCounter() as operators:
        read(torch.tensor([1.0, -1.0, 2.0]))
    assert operators.host_reads == expected
