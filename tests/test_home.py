"""A user without a home folder."""

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from okddip.errors import ConfigError
from okddip.home import ensure_home


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where a user that the system does not know finds a home."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"okddip-home-{os.getuid()}"


def test_a_user_without_a_home_gets_the_same_one_each_time(
    homeless: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        ensure_home()
        assert Path.home() == homeless
        assert "Set HOME" in capsys.readouterr().err
        monkeypatch.delenv("HOME")
    assert homeless.stat().st_mode & 0o777 == 0o700


def test_a_home_that_others_can_write_to_is_not_taken(homeless: Path) -> None:
    homeless.mkdir()
    homeless.chmod(0o777)
    with pytest.raises(ConfigError, match=r"HOME: is not set.*somebody else's\. Set HOME=FOLDER"):
        ensure_home()


def test_a_home_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ensure_home()
    assert os.environ["HOME"] == str(tmp_path)
