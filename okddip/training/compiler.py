"""What `torch.compile` needs of the machine."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from okddip.errors import ConfigError


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where what torch.compile starts is not there, before any data is read.

    Raises:
        ConfigError: names what is missing.
    """
    missing = missing_on_cuda() if device.type == "cuda" else missing_on_cpu()
    header = Path(sysconfig.get_path("include"), "Python.h")
    if missing is None and not header.is_file():
        missing = f"the headers of Python ({header}; Debian's package python3-dev)"
    if missing is not None:
        raise ConfigError(
            f"trainer.compile=true: compiling for {device.type} takes {missing}, not found here. Install it,"
            " or leave trainer.compile out."
        )


def missing_on_cpu() -> str | None:
    """What is missing to compile for the CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return f"a C++ compiler ({os.environ.get('CXX') or 'g++'}; the variable CXX names another)"
    return None


def missing_on_cuda() -> str | None:
    """What is missing to compile for CUDA."""
    from torch.utils._triton import has_triton, has_triton_package

    if not has_triton_package():
        return "Triton (pip install triton)"
    if not has_triton():
        return "a GPU that Triton knows"
    compilers = [os.environ["CC"].split()[0]] if os.environ.get("CC", "").strip() else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return "a C compiler (gcc or clang; the variable CC names another)"
    return None
