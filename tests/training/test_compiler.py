"""What `torch.compile` needs of the machine."""

import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._inductor.config
import torch.utils._triton
from omegaconf import DictConfig

from okddip.assembly import make
from okddip.errors import ConfigError
from okddip.training.compiler import check_compiler


def test_a_machine_without_a_cpp_compiler_is_told_before_any_data_is_read(
    configured: Callable[..., DictConfig],
) -> None:
    config = configured("trainer.compile=true", "trainer.device=cpu")
    make("trainer", config.trainer)
    refused = pytest.raises(ConfigError, match=r"trainer\.compile=true: .* a C\+\+ compiler \(.*CXX")
    with torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",)), refused:
        make("trainer", config.trainer)


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"headers of Python .*Python\.h"):
        check_compiler(torch.device("cpu"))


def test_what_cuda_needs_is_named_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for found in ([], ["has_triton_package"], ["has_triton_package", "has_triton"]):
        for name in ("has_triton_package", "has_triton"):
            monkeypatch.setattr(torch.utils._triton, name, lambda answer=name in found: answer)
        missing = ("Triton ", "a GPU that Triton knows", "a C compiler")[len(found)]
        with pytest.raises(ConfigError, match=f"compiling for cuda takes {missing}"):
            check_compiler(torch.device("cuda"))
