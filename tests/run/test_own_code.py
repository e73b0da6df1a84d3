"""Which files of one's own make a run what it is."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from okddip.run.own_code import code_digest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """On Python's path; what is imported from it is forgotten."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def digest_of(target: str) -> str:
    return code_digest({"method": {"_target_": target}})


def test_an_edited_file_counts_when_it_is_imported_anew(folder: Path) -> None:
    file = folder / "own_code_1.py"
    file.write_text("class Mine: pass\n")
    first = digest_of("own_code_1.Mine")
    assert len(first) == 16
    file.write_text("class Mine: edited = True\n")
    second = digest_of("own_code_1.Mine")
    assert second != first
    assert digest_of("own_code_1.Mine.make") == second
    module = importlib.import_module("own_code_1")
    assert digest_of("own_code_1.Mine.make") == second
    file.write_text("class Mine: edited = 'again'\n")
    assert digest_of("own_code_1.Mine") == second  # what this process computes with
    importlib.reload(module)
    assert digest_of("own_code_1.Mine") not in (first, second)


def test_all_files_of_a_package_count_where_the_package_is_named(folder: Path) -> None:
    package = folder / "own_code_2"
    package.mkdir()
    (package / "__init__.py").write_text("from own_code_2.parts import Mine\n")
    (package / "parts.py").write_text("class Mine: pass\n")
    first = digest_of("own_code_2.Mine")
    importlib.invalidate_caches()
    (package / "parts.py").write_text("class Mine: edited = True\n")
    assert digest_of("own_code_2.Mine") != first


def test_targets_in_lists_count_and_the_order_does_not(folder: Path) -> None:
    for name in ("own_code_3", "own_code_4"):
        (folder / f"{name}.py").write_text(f"{name} = 1\n")
    networks = [{"_target_": f"{name}.make"} for name in ("own_code_3", "own_code_4")]
    digests = {code_digest({"model": {"networks": those}}) for those in (networks, networks[::-1])}
    assert len(digests) == 1
    assert code_digest({"model": {"networks": networks[:1]}}) not in {"", *digests}


def test_what_is_installed_or_ours_or_tracks_is_no_code_of_ones_own(folder: Path) -> None:
    (folder / "own_code_5.py").write_text("")
    for target in (
        "okddip.methods.dml.DML",
        "torch.optim.SGD",
        "functools.partial",
        "builtins.dict",
        "nope.X",
    ):
        assert digest_of(target) == ""
    assert code_digest({"tracking": {"_target_": "own_code_5.Tracker"}}) == ""


def test_a_package_that_cannot_be_imported_is_left_to_those_who_say_so(folder: Path) -> None:
    (folder / "own_code_6").mkdir()
    (folder / "own_code_6" / "__init__.py").write_text("undefined\n")
    assert digest_of("own_code_6.part.Mine") != ""  # of the package, which can be found
