"""A user's own code that a run is made with: a method, model or data set outside this program.

The configuration names it and stays the same when it is edited; so its digest is kept with the run.
"""

import hashlib
import sysconfig
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from okddip.trust import targets

CODE = "code"  # the tag of a run, and the key of its `run.json`
PROGRAM = ("okddip.", "hydra_plugins.")  # whose version is recorded
INSTALLED = ("site-packages", "dist-packages")
DIGEST = "okddip_digest"  # an attribute of the spec of a module


def code_digest(config: DictConfig | dict[str, Any]) -> str:
    """A digest of the files that each `_target_` of the user's own names; empty if there are none.

    That is the file of a module, or all files of a package, without what they import from elsewhere. What is
    imported already counts as it was then: it is what this process computes with.
    """
    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    names = {str(target) for _, target in targets(plain) if not str(target).startswith(PROGRAM)}
    digests = sorted({digest for name in names if (digest := target_digest(name))})
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16] if digests else ""


def target_digest(target: str) -> str:
    """A digest of the files of the module that holds `mine.Method` or `package.module.Class.make`.

    Empty for what is installed, and for what has no file.
    """
    module = target
    while "." in module:
        module = module.rpartition(".")[0]
        try:
            spec = find_spec(module)
        except Exception:  # it is no module, or its package cannot be imported; `make` says why
            continue
        if spec is not None:
            return spec_digest(spec)
    return ""


def spec_digest(spec: ModuleSpec) -> str:
    known = spec.__dict__  # a module that is imported keeps its spec until it is reloaded
    if DIGEST not in known:
        files = own_files(Path(spec.origin or ""))
        known[DIGEST] = hashlib.sha256(b"\0".join(map(Path.read_bytes, files))).hexdigest() if files else ""
    return str(known[DIGEST])


def own_files(file: Path) -> list[Path]:
    """The file of a module, or those of a package; none of what is installed, or comes with Python."""
    standard = Path(sysconfig.get_path("stdlib"))
    if not file.is_file() or set(INSTALLED) & set(file.parts) or standard in file.parents:
        return []
    return sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
