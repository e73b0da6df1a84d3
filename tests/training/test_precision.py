"""Precisions that a processor has no instructions for."""

import dataclasses
import logging
from collections.abc import Callable

import pytest
import torch
from omegaconf import DictConfig

from okddip.run.parts import Parts
from okddip.tasks.benchmark import timing
from okddip.training import trainer
from okddip.training.precision import PRECISIONS, is_native


def test_every_device_has_instructions_for_fp32_and_cuda_for_all() -> None:
    assert is_native("fp32", torch.device("cpu"))
    assert all(is_native(precision, torch.device("cuda")) for precision in PRECISIONS)


@pytest.mark.parametrize(("native", "said"), [(True, 0), (False, 1)])
def test_a_precision_that_is_emulated_is_said_to_take_longer(
    configured: Callable[..., DictConfig],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    native: bool,
    said: int,
) -> None:
    monkeypatch.setattr(trainer, "is_native", lambda precision, device: native)
    config = configured("trainer.device=cpu", "trainer.precision=bf16").trainer
    with caplog.at_level(logging.WARNING):
        trainer.Trainer(**{str(key): value for key, value in config.items() if key != "_target_"})
    warnings = [each for each in caplog.messages if each.startswith("trainer.precision=bf16: this processor")]
    assert len(warnings) == said


def test_the_peak_is_that_of_fp32_where_the_precision_is_emulated(
    synthetic_parts: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(timing.MATRIX_SIZE, "cpu", 8)
    fp32 = synthetic_parts("trainer.precision=fp32").trainer
    bf16 = dataclasses.replace(fp32, precision="bf16")
    for native, dtype in (True, torch.bfloat16), (False, torch.float32):
        monkeypatch.setattr(timing, "is_native", lambda precision, device, native=native: native)
        assert timing.matrix_product(bf16).run().dtype == dtype  # type: ignore[attr-defined]
