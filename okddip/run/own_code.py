"""A user's own code that a run is made with: a method, model or data set outside this program.

The configuration names it and stays the same when it is edited. So
a digest of its files is kept with the run.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from okddip.tracking.params import flatten

CODE = "code"  # the tag of a run, and the key of its `run.json`
OTHERS = ("okddip.", "torch.", "torchvision.", "hydra_plugins.")  # whose versions are recorded


def code_digest(config: DictConfig | dict[str, Any]) -> str:
    """A digest of the source files that the `_target_` of one's own name; empty if there are none.

    Not of what these files import.
    """
    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    targets = {
        value
        for key, value in flatten(cast(dict[str, Any], plain)).items()
        if key.endswith("_target_") and not value.startswith(OTHERS)
    }
    files = sorted({file for target in targets if (file := source_file(target)) is not None})
    if not files:
        return ""
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def source_file(target: str) -> Path | None:
    """The file of the module that holds `mine.Method` or `package.module.Class.make`; None if it has none."""
    module = target
    while "." in module:
        module = module.rpartition(".")[0]
        try:
            spec = find_spec(module)
        except (ImportError, AttributeError, ValueError):  # what precedes the last dot is no package
            continue
        if spec is not None:
            return Path(spec.origin) if spec.origin and Path(spec.origin).is_file() else None
    return None
