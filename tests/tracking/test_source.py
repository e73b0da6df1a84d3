"""Who runs which code where."""

import subprocess
from pathlib import Path

from okddip.tracking.source import git_changes, git_commit


def test_the_commit_is_that_of_the_folder(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert git_commit(tmp_path) == head.strip()


def test_files_that_are_not_as_committed_are_found(tmp_path: Path) -> None:
    assert git_changes(tmp_path) == []
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b.c"]
    for name in ("kept.py", "changed.py"):
        (tmp_path / name).write_text("1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    assert git_changes(tmp_path) == []
    (tmp_path / "changed.py").write_text("2\n")
    (tmp_path / "results.txt").write_text("no code\n")
    assert git_changes(tmp_path) == ["changed.py"]
