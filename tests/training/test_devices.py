"""Devices that are asked for and cannot be used: one sentence each, before any data is read."""

import logging
from collections.abc import Callable

import pytest
import torch
from omegaconf import DictConfig

from okddip.errors import ConfigError
from okddip.main import build
from okddip.training.devices import check_device, find_device

TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by"
    " downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)


def init_fails(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def init() -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Found no NVIDIA driver on your system. Please check that"), "Found no NVIDIA driver"),
        (AssertionError("Torch not compiled with CUDA enabled"), "Torch not compiled with CUDA enabled"),
        (RuntimeError(TOO_OLD), r"is too old \(found version 12020\)\)\. Update the driver, or install a"),
    ],
)
def test_cuda_that_is_not_there_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    init_fails(monkeypatch, error)
    with pytest.raises(ConfigError, match=rf"trainer\.device=cuda: PyTorch sees 0 CUDA devices.*{reason}"):
        find_device("cuda")


def test_a_driver_that_is_too_old_is_told_where_the_cpu_takes_its_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    init_fails(monkeypatch, RuntimeError(TOO_OLD))
    with caplog.at_level(logging.INFO):
        assert find_device("auto") == torch.device("cpu")
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "too old (found version 12020)): training on the CPU" in record.getMessage()


@pytest.mark.parametrize(("name", "chosen"), [("cuda:1", [torch.device("cuda:1")]), ("cuda", [])])
def test_a_gpu_that_is_named_is_that_of_events_and_page_locked_memory_too(
    monkeypatch: pytest.MonkeyPatch, name: str, chosen: list[torch.device]
) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert find_device(name) == torch.device(name)
    assert current == chosen


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has"),
        RuntimeError(
            "CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might"
        ),
        RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel"),
        RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "zeros", fail)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", fail)
    reason = str(error).partition("\n")[0].partition(". ")[0]
    what_to_do = "Update the driver, or install" if "too old" in reason else "See with nvidia-smi"
    with pytest.raises(ConfigError) as refused:
        check_device(torch.device("cuda:1"))
    words = f"trainer.device=cuda:1: cannot be used ({reason}). {what_to_do}"
    assert str(refused.value).startswith(words)
    with pytest.raises(ConfigError, match=r"trainer\.device=cuda:1: cannot be used"):
        find_device("cuda:1")


def test_the_device_is_tried_before_any_data_is_read(
    configured: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: torch.device) -> None:
        raise ConfigError("cannot be used")

    monkeypatch.setattr("okddip.training.devices.check_device", refuse)
    with pytest.raises(ConfigError, match="cannot be used"):
        build(configured("tracking=none", "dataset.root=nowhere", "trainer.device=cpu"))
