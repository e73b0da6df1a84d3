"""Text of others on its way out, one kind of output at a time; and through the tasks that read images."""

import logging
import subprocess
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Answer, folders_of_images
from hypothesis import example, given, settings
from hypothesis import strategies as st

from okddip.data.folder import scan
from okddip.errors import ConfigError
from okddip.sweeps.outcomes import Outcome
from okddip.sweeps.parent import sweep_description
from okddip.sweeps.summary import print_summary
from okddip.sweeps.sweep import Sweep
from okddip.text import (
    LogFormatter,
    for_csv,
    for_latex,
    for_markdown,
    for_shell,
    for_terminal,
    listed,
    okddip_command,
)

Okddip = Callable[..., Answer]

ACTING = ["\x1b]0;title\x07", "\x9b2J", "\u202egnp.exe", "a\nb", "a\rb", "$\\frac{", "=1+1", "<b>"]
CLASSES = [*ACTING, "[x](javascript:y)", "Größe"]


def acting(text: str, lines: bool = True) -> list[str]:
    """The characters in it that a terminal would obey or hide."""
    kinds = ("Cc", "Cf", "Cs", "Zl", "Zp")
    found = [char for char in text if unicodedata.category(char) in kinds and char not in "\u200c\u200d"]
    return [char for char in found if not (lines and char == "\n")]


@settings(deadline=None)
@given(st.text(st.characters(categories=None)))
@example("".join(map(chr, range(0x300))))
def test_no_output_has_a_character_that_acts(text: str) -> None:
    for written in (for_terminal(text), for_markdown(text), for_latex(text), str(for_csv(text))):
        assert not acting(written, lines=False)
    assert not acting(for_shell([text]), lines=False)
    assert not acting(str(ConfigError(text)).replace("\t", ""))


@pytest.mark.parametrize("text", ["Größe ± 1", "фото", "写真", "می‌خواهم", "👩‍🔬", "a b-c_d.e"])
def test_other_text_stays_as_it_is(text: str) -> None:
    assert for_terminal(text) == text


@settings(deadline=None)  # starts a shell each time
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
@example(["a\nb", "it's\t\\", "\x1b[2J", "\u202ex", "$(id)", "", "!x", "\udcff"])
def test_a_shell_takes_a_command_apart_into_its_words(words: list[str]) -> None:
    command = f"printf '%s\\0' {for_shell(['first', *words])}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    expected = [word.encode(errors="surrogateescape") for word in words]
    assert done.stdout.split(b"\0")[1:-1] == expected


@pytest.mark.parametrize("value", ["-1", "+2.5", "-1e-05", "3", -1, 2.5, None, True])
def test_numbers_stay_numbers(value: object) -> None:
    assert for_csv(value) == value


def test_commands_of_the_program_are_known_for_such() -> None:
    typed = ["okddip", "-m", "--config-dir", "my options", "method=one,okddip", "+x.y=[1,2]", "~optimizer.lr"]
    assert okddip_command(for_shell(typed)) == typed
    for other in ("okddip; id", "okddip | sh", "okddip id", "./okddip seed=1", "okddip 'x", "okddip -x"):
        assert okddip_command(other) is None


def test_a_log_keeps_the_ends_of_its_own_lines_alone() -> None:
    record = logging.LogRecord("okddip", logging.INFO, "", 0, "a\n  b\t%s", ("\x1b[2J\r\u2028",), None)
    assert LogFormatter("%(message)s").format(record) == "a\n  b\t\\x1b[2J\\r\\u2028"


def test_no_line_of_an_error_passes_for_another_message() -> None:
    assert str(ConfigError("a: b\nokddip: all is well")) == "a: b\n  okddip: all is well"


@pytest.mark.parametrize("text", CLASSES)
def test_the_last_lines_of_a_sweep_command_no_terminal(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = [Outcome(0, [f"dataset.root={text}"], "failed", str(ConfigError(text)))]
    print_summary(Sweep(text, Path()), outcomes, "FAILED", None)
    out = capsys.readouterr().out
    assert not acting(out)
    assert [line.split()[0] for line in out.splitlines() if line[0] != " "] == ["Sweep", "failed"]


@pytest.mark.parametrize("text", ["<img src=x onerror=alert(1)>", "[x](javascript:y)", "![x](http://y)"])
def test_the_description_of_a_sweep_has_no_links_or_tags(text: str) -> None:
    note = sweep_description({"dataset.root": text})
    assert for_markdown(text) in note
    assert text not in note


def test_of_many_names_the_first_are_listed() -> None:
    assert listed(["cat", "7", "\x1b[2J"]) == "'cat', '7', '\\x1b[2J'"
    assert listed([str(number) for number in range(10_000)], 2) == "'0', '1' and 9,998 more"


@pytest.mark.slow
def test_classes_and_files_called_so_pass_through_all_tasks(okddip: Okddip, tmp_path: Path) -> None:
    folders_of_images(tmp_path / "images", *CLASSES, seed=0)
    small = ("dataset=image_folder", "dataset.root=images", "model=resnet8", "method=baseline")
    small = (*small, "trainer.epochs=1", "trainer.limit_batches=1", "tracking=none")
    outputs = [okddip(*small, "hydra.run.dir=run")]
    outputs.append(okddip("task=evaluate", "checkpoint=run", "tracking=none", "hydra.run.dir=evaluation"))
    outputs.append(okddip("task=export", "checkpoint=run", "export.formats=[torch]", "tracking=none"))
    assert [answer.code for answer in outputs] == [0, 0, 0], outputs
    hardest = [line for line in outputs[1].out.splitlines() if line.startswith("hardest")]
    assert len(hardest) == 1
    for number in (0, 1):
        bad = tmp_path / "images" / "test" / CLASSES[number] / f"{ACTING[number]}\n{CLASSES[3]}.png"
        bad.write_bytes(b"no image")
        outputs.append(okddip(*small, "hydra.run.dir=other"))
        assert "is not an image" in outputs[-1].err
        assert "\nb" not in outputs[-1].err
        bad.unlink()
    for answer in outputs:
        assert not acting(answer.out + answer.err)
    for log in tmp_path.rglob("*.log"):
        assert not acting(log.read_text(encoding="utf-8"))


@pytest.mark.parametrize("logs", ["none", "disabled", "stdout"])
def test_logs_can_be_left_out(okddip: Okddip, tmp_path: Path, logs: str) -> None:
    small = ("dataset=digits", "model=resnet8", "method=baseline", "trainer.epochs=1", "tracking=none")
    answer = okddip(*small, "trainer.limit_batches=1", f"hydra/job_logging={logs}")
    assert answer.code == 0, answer.err
    assert ("student" in answer.out) == (logs != "disabled")
    assert not list(tmp_path.rglob("main.log"))


def test_a_class_is_one_however_its_letters_are_written(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "Größe") for form in ("NFC", "NFD"))
    assert composed != apart
    folders_of_images(tmp_path / "images", "a", composed, seed=0)
    (tmp_path / "images" / "test" / composed).rename(tmp_path / "images" / "test" / apart)
    listing = scan(tmp_path / "images", ("train", "test"))
    assert set(listing.classes) == {"a", composed}
    assert {split: len(files) for split, files in listing.files.items()} == {"train": 16, "test": 16}
    (tmp_path / "images" / "test" / composed).mkdir()
    with pytest.raises(ConfigError, match="two folders are called Größe"):
        scan(tmp_path / "images", ("train", "test"))
