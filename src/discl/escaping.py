"""Makes other people's text safe for terminals, HTML, CSV, Markdown and LaTeX.

Names of files and classes, prompts, answers of servers and errors that quote them may hold anything: codes that
steer a terminal, HTML, formulas of a spreadsheet. Pages are escaped by their templates, all else here.
"""

from __future__ import annotations

import re

HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # steer a terminal
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # change the direction of what follows
    "\u2028\u2029\ufff9-\ufffb\ufeff\ud800-\udfff\U000e0000-\U000e007f]"  # break lines, or are not seen
)
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""How a cell begins that spreadsheets take for a formula."""
MARKDOWN = {"&": "&amp;", "<": "&lt;", ">": "&gt;", **{each: f"\\{each}" for each in "\\`*|"}}
LIVE = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\](?=[(\[:])")
"""An underscore that is not within a word, and a bracket that may end the text of a link."""
LATEX = {
    **{each: f"\\{each}" for each in "%_&#${}"}, "\\": r"\textbackslash{}", "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}", "–": "--", "λ": r"$\lambda$", "±": r"$\pm$",
}  # fmt: skip


def for_terminal(text: str) -> str:
    r"""The text with codes that steer a terminal, and what is not seen, as `\x1b` or `\u202e`; lines stay lines."""
    return HIDDEN.sub(lambda found: _code(found.group()), text)


def message(text: str) -> str:
    """As `for_terminal`, with lines after the first indented, so that a name in it cannot pass for another message."""
    return re.sub(r"\n(?! )", "\n  ", for_terminal(text))


def one_line(text: str) -> str:
    r"""As `for_terminal`, with line breaks and tabs as `\n` and `\t` too: a name begins no line of its own."""
    return for_terminal(text).replace("\n", "\\n").replace("\t", "\\t")


def for_csv(text: str) -> str:
    """A cell of text that a spreadsheet takes for no formula: where it begins like one, behind an apostrophe.

    Numbers that we write, such as -0.5, are not passed through here.
    """
    return f"'{text}" if text.startswith(FORMULA) else text


def for_markdown(text: str) -> str:
    """The text on one line of Markdown, as it is: no HTML, no link, no column of a table."""
    marked = LIVE.sub(lambda found: "\0" + found.group(), one_line(" ".join(text.split())))
    return _mapped(marked, MARKDOWN).replace("\0", "\\")


def for_latex(text: str) -> str:
    """The text on one line of LaTeX, without a command in it."""
    return _mapped(one_line(" ".join(text.split())), LATEX)


def _mapped(text: str, table: dict[str, str]) -> str:
    return "".join(table.get(letter, letter) for letter in text)


def _code(letter: str) -> str:
    number = ord(letter)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
