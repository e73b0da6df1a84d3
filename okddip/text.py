"""Text of others on its way out: names and commands from a shared store, classes and files of an archive.

One function for each kind of output. None of them lets such text act (move the cursor, run a command, become
a link or a formula), and all of them show what it was. Figures need `for_terminal` and `FIGURES`.
"""

import logging
import re
import shlex
import sys
import unicodedata
from collections.abc import Iterable
from io import TextIOWrapper

# Control characters, invisible ones such as those that turn the direction of writing, halves of surrogate
# pairs (bytes of file names that are no UTF-8), and separators of lines and paragraphs
INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # invisible, but scripts and emoji are written with them
OPENS_FORMULA = re.compile(r"[=+\-@\uff1d\uff0b\uff0d\uff20]")  # \uff..: full-width forms of the same
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?", re.IGNORECASE)
MARKDOWN = {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {sign: f"\\{sign}" for sign in "\\`*_[]|~!#"}
LATEX = {
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}
# Settings of Matplotlib with which text is only text: no formulas between dollars, no LaTeX
FIGURES = {"text.parse_math": False, "text.usetex": False}
OVERRIDE = re.compile(r"~[\w./@:-]+|[+~]{0,2}[\w./@:-]+=.*", re.DOTALL)  # of Hydra
SWITCHES = ("-m", "--multirun")
FLAGS = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp")  # a value follows


def for_terminal(text: object, *, lines: bool = False) -> str:
    r"""Text in one line in which a terminal finds no commands: ESC becomes `\x1b`, a line's end `\n`.

    Args:
        text: any.
        lines: leave ends of lines and tabs; for what the program itself has put together.
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
    """Whether this is how Python writes a byte of a file name that is no UTF-8."""
    return "\udc80" <= char <= "\udcff"


def for_markdown(text: object) -> str:
    """Text in one line that Markdown, with tables and links of GitHub's kind or MLflow's, shows as it is."""
    marked = "".join(MARKDOWN.get(char, char) for char in for_terminal(text))
    return re.sub(r"(?<=\bwww)\.|:(?=//)", r"\\\g<0>", marked)  # addresses become links by themselves


def for_latex(text: object) -> str:
    """Text in one line that LaTeX sets as it is, as a cell of a table too."""
    marked = "".join(LATEX.get(char, char) for char in for_terminal(text))
    marked = re.sub(r"^[\[*]", r"{\g<0>}", marked)  # to the line's end before it an option
    marked = marked.replace("±", "$\\pm$")
    return re.sub(r"(?<![\w.-])([+-])(?=\d)", r"$\1$", marked)


def for_csv(value: object) -> object:
    """A cell that spreadsheets do not take for a formula; numbers, also those in text, stay as they are."""
    if not isinstance(value, str) or NUMBER.fullmatch(value):
        return value
    text = for_terminal(value)
    return f"'{text}" if OPENS_FORMULA.match(text) else text


def for_shell(words: Iterable[str]) -> str:
    """A command in one line that a shell (bash, zsh, ksh) takes apart into these very words."""
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
    """Names to be compared: in one of the several ways in which Unicode writes the same letters down."""
    return [unicodedata.normalize("NFC", name) for name in names]


def okddip_command(typed: str) -> list[str] | None:
    """The words of a command line that calls this program and nothing else; None if it is another.

    What others have written down as the command of a run may be any text.
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
    """Lets no message command a terminal, whoever wrote what is quoted in it.

    Ends of lines stay, as many messages are tables: what is quoted in those goes through `for_terminal`.
    """

    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record), lines=True)


def show_whatever_comes() -> None:
    """Let the terminal's encoding cost no output: what it lacks is shown as Python would write it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
