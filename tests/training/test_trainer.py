"""What a training step is made of; that training learns, resumes and counts is shown by tests of runs."""

import os
from collections.abc import Callable

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from okddip.checks import check
from okddip.data.loader import Share
from okddip.errors import ConfigError
from okddip.main import build
from okddip.run.parts import Parts
from okddip.training.trainer import Trainer

BuildParts = Callable[..., Parts]


@pytest.fixture
def parts(configured: Callable[..., DictConfig]) -> BuildParts:
    def make(*overrides: str) -> Parts:
        config = configured("dataset=digits", "model=resnet8", "tracking=none", *overrides)
        check(config)
        return build(config)

    return make


def settings(configured: Callable[..., DictConfig], **changes: object) -> dict[str, object]:
    config = configured("trainer.device=cpu")
    return {key: value for key, value in config.trainer.items() if key != "_target_"} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"accumulate": 2, "sync_batch_norm": True},
            "trainer.accumulate, trainer.sync_batch_norm: do not go",
        ),
        ({"sync_batch_norm": True}, "PyTorch synchronises batch norm on CUDA only"),
        (
            {"accumulate": 3},
            "trainer.batch_size=128: must be divisible by ranks x trainer.accumulate = 1 x 3",
        ),
        ({"accumulate": 128}, "leave at least 2 images for each part"),
        (
            {"accumulate": 2, "compile": True, "compile_mode": "reduce-overhead"},
            "does not go with trainer.compile_mode=reduce-overhead",
        ),
        ({"resume": 5}, "trainer.resume=5: must be null, auto, a path or runs:/ID."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_are_wrong_or_do_not_go_together_are_refused(
    configured: Callable[..., DictConfig], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        Trainer(**settings(configured, **changes))  # type: ignore[arg-type]
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("size", "accumulate", "share", "expected"),
    [
        (1437, 1, Share(), 128),
        (100, 1, Share(), 100),  # a training set smaller than a batch is one batch
        (1437, 4, Share(), 32),
        (1437, 2, Share(1, 4), 16),
        (5, 1, Share(1, 4), 3),
        (2, 1, Share(1, 4), 0),
    ],
)
def test_a_full_batch_is_known_before_the_first(
    parts: BuildParts,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    accumulate: int,
    share: Share,
    expected: int,
) -> None:
    built = parts("trainer.batch_size=128", f"trainer.accumulate={accumulate}")
    built.dataset.sizes["train"] = size
    monkeypatch.setenv("RANK", str(share.rank))
    monkeypatch.setenv("WORLD_SIZE", str(share.ranks))
    assert built.trainer.train_images(built.dataset) == expected


def test_only_full_batches_are_compiled(parts: BuildParts) -> None:
    built = parts("method=baseline", "trainer.compile=true", "trainer.batch_size=8")
    step = built.trainer.forward_step(built.group, built.method, 8, diversity=False)
    compiled = []

    def record(images: Tensor, labels: Tensor, ramp: Tensor) -> object:
        compiled.append(len(images))
        return step.step(images, labels, ramp)

    step.compiled = record
    for size in (7, 8, 0, 8, 5):  # the first may be short: an image in it could not be read
        step(torch.rand(size, 1, 8, 8), torch.zeros(size, dtype=torch.int64), torch.ones(()))
    assert compiled == [8, 8]


def test_batch_norm_gets_fp32_where_a_rank_has_no_image(parts: BuildParts) -> None:
    """SyncBatchNorm sends statistics in fp32, and for no images zeros in the type of its input."""
    built = parts("method=one", "method.peers=3", "trainer.precision=bf16")
    step = built.trainer.forward_step(built.group, built.method, 4, diversity=False)
    types: dict[int, set[torch.dtype]] = {}
    for module in [*built.group.modules(), *built.method.modules()]:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda _, inputs: types.setdefault(len(inputs[0]), set()).add(inputs[0].dtype)
            )
    for size in (4, 0):
        loss, _ = step(torch.rand(size, 1, 8, 8), torch.zeros(size, dtype=torch.int64), torch.ones(()))
        loss.backward()
    assert torch.bfloat16 in types[4]
    assert types[0] == {torch.float32}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            "CUDA out of memory",
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "CUDA error: out of memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"),
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
        ),
        (
            RuntimeError("GET was unable to find an engine to execute this computation"),
            "GET was unable to find an engine to execute this computation",
        ),
    ],
)
def test_a_device_whose_memory_is_full_is_named(parts: BuildParts, error: RuntimeError, reason: str) -> None:
    trainer = parts("trainer.batch_size=8").trainer
    with pytest.raises(ConfigError) as refused, trainer.named_errors():
        raise error
    words = str(refused.value)
    assert words.startswith(
        f"trainer.batch_size=8, trainer.eval_batch_size=256: the memory of cpu is full ({reason}"
    )
    assert "Take smaller batches, trainer.accumulate=2" in words


def test_what_is_no_lack_of_memory_stays_what_it_is(parts: BuildParts) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be"), parts().trainer.named_errors():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_deterministic_algorithms_are_for_the_run_that_asks_for_them(
    configured: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    for deterministic in (True, False):
        Trainer(**settings(configured, deterministic=deterministic)).set_backend_flags()  # type: ignore[arg-type]
        assert torch.are_deterministic_algorithms_enabled() == cudnn.deterministic == deterministic
        assert cudnn.benchmark == (not deterministic)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_set_so_that_all_of_pytorch_can_read_it(
    configured: Callable[..., DictConfig], tf32: bool
) -> None:
    Trainer(**settings(configured, tf32=tf32)).set_backend_flags()  # type: ignore[arg-type]
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    assert matmul.allow_tf32 == cudnn.allow_tf32 == tf32
    assert (matmul.fp32_precision == "tf32") == (cudnn.conv.fp32_precision == "tf32") == tf32  # type: ignore[attr-defined]
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))


CUBLAS_WAS_SET_UP = (  # PyTorch's words, aten/src/ATen/Context.cpp
    "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or"
    " `at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it"
    " uses CuBLAS and you have CUDA >= 10.2."
)


def test_an_operator_that_has_no_deterministic_form_is_named(configured: Callable[..., DictConfig]) -> None:
    trainer = Trainer(**settings(configured, deterministic=True))  # type: ignore[arg-type]
    trainer.set_backend_flags()
    try:
        with pytest.raises(ConfigError) as refused, trainer.named_errors():
            torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert str(refused.value).startswith(
        "trainer.deterministic=true: PyTorch's put_ has no deterministic form on cpu. Choose another model"
    )
    with pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 before"), trainer.named_errors():
        raise RuntimeError(CUBLAS_WAS_SET_UP)
    with pytest.raises(RuntimeError, match="something else"), trainer.named_errors():
        raise RuntimeError("something else")


@pytest.mark.parametrize("method", ["one", "okddip", "ffl"])
def test_every_batch_norm_can_be_synchronised(parts: BuildParts, method: str) -> None:
    built = parts(f"method={method}", "method.peers=3")
    modules = (built.group, built.method)
    names = [
        name
        for module in modules
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
    ]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    converted = [nn.SyncBatchNorm.convert_sync_batchnorm(module) for module in modules]
    synchronised = [
        name
        for module in converted
        for name, part in module.named_modules()
        if isinstance(part, nn.SyncBatchNorm)
    ]
    assert synchronised == names != []
    assert ("gate" in " ".join(names)) == (method == "one")
    assert ("fusion" in " ".join(names)) == (method == "ffl")
    assert [parameter for module in converted for parameter in module.parameters()] == parameters
