"""Escape text that other people wrote: names and commands in a shared store, classes and files of an archive.

One function for each kind of output. Escaped text cannot act (move the cursor, run a command, become a link
or a formula), and still shows what it was. Figures need `for_terminal` and `FIGURES`.
"""

import logging
import re
import shlex
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from io import TextIOWrapper
from typing import Any

# Control characters, invisible ones such as those that turn the direction of writing, halves of surrogate
# pairs (bytes of file names that are not UTF-8), and separators of lines and paragraphs
INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # invisible, but scripts and emoji are written with them
OPENS_FORMULA = re.compile(r"[=+\-@\uff1d\uff0b\uff0d\uff20]")  # \uff..: full-width forms of the same
MINUS = "\u2212"  # the sign of negative numbers where people read
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?", re.IGNORECASE)
MARKDOWN = {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {sign: f"\\{sign}" for sign in "\\`*_[]|~!#"}
LATEX = {
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}
# Settings of Matplotlib with which text is only text: no formulas between dollars, no LaTeX
FIGURES = {"text.parse_math": False, "text.usetex": False}
ONCE = {"once": True}  # for `log.info(..., extra=ONCE)`; see `is_said_once`
OVERRIDE = re.compile(r"~[\w./@:-]+|[+~]{0,2}[\w./@:-]+=.*", re.DOTALL)  # of Hydra
UNQUOTED = re.compile(r"[A-Za-z_./][\w./:\-]*")  # strings that Hydra takes without quotes
NOT_STRINGS = ("null", "true", "false", "inf", "nan")
SWITCHES = ("-m", "--multirun")
FLAGS = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp")  # a value follows


def for_terminal(text: object, *, lines: bool = False) -> str:
    r"""Text in one line without terminal commands: ESC becomes `\x1b`, the end of a line `\n`.

    Args:
        text: any.
        lines: keep ends of lines and tabs; for text that the program itself has put together.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(char if visible(char) or (lines and char in "\n\t") else escaped(char) for char in text)


def visible(char: str) -> bool:
    return char in JOINERS or unicodedata.category(char) not in INVISIBLE


def escaped(char: str) -> str:
    if is_byte(char):
        return in_bytes(char)
    return char.encode("unicode_escape").decode("ascii")


def is_byte(char: str) -> bool:
    """Whether this is how Python writes a byte of a file name that is not UTF-8."""
    return "\udc80" <= char <= "\udcff"


def for_markdown(text: object) -> str:
    """Text in one line that Markdown (GitHub's and MLflow's) shows as it is, also in tables."""
    marked = "".join(MARKDOWN.get(char, char) for char in for_terminal(text))
    return re.sub(r"(?<=\bwww)\.|:(?=//)", r"\\\g<0>", marked)  # addresses would become links


def for_latex(text: object) -> str:
    """Text in one line that LaTeX sets as it is, also as a cell of a table."""
    marked = "".join(LATEX.get(char, char) for char in for_terminal(text))
    marked = re.sub(r"^[\[*]", r"{\g<0>}", marked)  # after a line's end, LaTeX would read an option
    marked = marked.replace("±", "$\\pm$").replace(MINUS, "$-$")
    return re.sub(r"(?<![\w.-])([+-])(?=\d)", r"$\1$", marked)


def for_csv(value: object) -> object:
    """A cell that spreadsheets do not read as a formula; numbers, also as text, stay as they are."""
    if not isinstance(value, str) or NUMBER.fullmatch(value):
        return value
    text = for_terminal(value)
    return f"'{text}" if OPENS_FORMULA.match(text) else text


def for_shell(words: Iterable[str]) -> str:
    """A command in one line that a shell (bash, zsh, ksh) splits into exactly these words."""
    return " ".join(map(for_shell_word, words))


def for_shell_word(word: str) -> str:
    if all(map(visible, word)):
        return shlex.quote(word)
    return (
        "$'"
        + "".join(
            f"\\{char}" if char in "\\'" else char if visible(char) else in_bytes(char) for char in word
        )
        + "'"
    )


def in_bytes(char: str) -> str:
    encoded = char.encode(errors="surrogateescape" if is_byte(char) else "surrogatepass")
    return "".join(f"\\x{byte:02x}" for byte in encoded)


def composed(names: Iterable[str]) -> list[str]:
    """Names in Unicode's composed form (NFC), so that equal ones compare equal."""
    return [unicodedata.normalize("NFC", name) for name in names]


def as_override(value: Any) -> str:
    """A value in Hydra's override grammar, of the same type when it is parsed."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{as_override(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(as_override, value)) + "]"
    if not isinstance(value, str):
        return repr(value)
    if UNQUOTED.fullmatch(value) and value.lower() not in NOT_STRINGS:
        return value
    # a backslash counts for two before a quote alone
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", value)) + "'"


def listed(names: Sequence[str], most: int = 20) -> str:
    """The first names in quotes and how many more there are: `'cat', 'dog' and 8 more`."""
    shown = ", ".join(f"'{for_terminal(name)}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def okddip_command(typed: str) -> list[str] | None:
    """The words of a command line that calls this program and nothing else; None if it does not.

    The command of a run in a shared store may be any text.
    """
    try:
        program, *arguments = shlex.split(typed)
    except ValueError:  # a quote is not closed, or there is nothing
        return None
    rest = iter(arguments)
    for argument in rest:
        name, given, _ = argument.partition("=")
        if name in FLAGS:
            if not given and next(rest, None) is None:
                return None
        elif argument not in SWITCHES and not OVERRIDE.fullmatch(argument):
            return None
    return [program, *arguments] if program == "okddip" else None


class LogFormatter(logging.Formatter):
    """Escapes terminal commands in messages, which may quote text of other people.

    Ends of lines stay, as many messages are tables; text that is quoted there goes through `for_terminal`.

    Attributes:
        prefix: of each line.
    """

    prefix = ""

    def format(self, record: logging.LogRecord) -> str:
        text = for_terminal(super().format(record), lines=True)
        return self.prefix + text.replace("\n", f"\n{self.prefix}")


def is_said_once(record: logging.LogRecord) -> bool:
    """Whether one job of a sweep logs this for all: warnings, and what is logged with `extra=ONCE`."""
    return record.levelno == logging.WARNING or getattr(record, "once", False)


def replace_unencodable_output() -> None:
    """Print characters that the terminal's encoding lacks as Python escapes them, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            with suppress(OSError):  # one that cannot be flushed
                stream.reconfigure(errors="backslashreplace")
