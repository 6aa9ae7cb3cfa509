"""Makes other people's text safe for terminals, HTML, CSV, Markdown and LaTeX.

Names of files and classes, prompts, answers of servers, and errors that quote them may hold
anything: terminal codes, HTML, spreadsheet formulas. Templates escape pages; this module escapes
everything else.
"""

from __future__ import annotations

import re

HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control a terminal
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # change the direction of text
    "\u2028\u2029\ufff9-\ufffb\ufeff\ud800-\udfff\U000e0000-\U000e007f]"  # breaks, invisible
)
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""Beginnings of cells that spreadsheets take for formulas."""
MARKDOWN = {"&": "&amp;", "<": "&lt;", ">": "&gt;", **{each: f"\\{each}" for each in "\\`*|"}}
LIVE = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\](?=[(\[:])")
"""An underscore outside a word, and a bracket that may end the text of a link."""
LATEX = {
    **{each: f"\\{each}" for each in "%_&#${}"},
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "–": "--",
    "−": "$-$",
    "λ": r"$\lambda$",
    "±": r"$\pm$",
}


def for_terminal(text: str) -> str:
    r"""The text with terminal codes and invisible characters as `\x1b` or `\u202e`; keeps lines."""
    return HIDDEN.sub(lambda found: _code(found.group()), text)


def message(text: str) -> str:
    """As `for_terminal`, with later lines indented, so that a name cannot fake another message."""
    return re.sub(r"\n(?! )", "\n  ", for_terminal(text))


def one_line(text: str) -> str:
    r"""As `for_terminal`, with line breaks and tabs as `\n` and `\t`, so that it is one line."""
    return for_terminal(text).replace("\n", "\\n").replace("\t", "\\t")


def for_csv(text: str) -> str:
    """A cell of text; an apostrophe goes before one that begins like a spreadsheet formula.

    It is for texts only. Numbers such as -0.5 stay as they are.
    """
    return f"'{text}" if text.startswith(FORMULA) else text


def for_markdown(text: str) -> str:
    """The text on one line of Markdown, literally: no HTML, no link, no table column."""
    marked = LIVE.sub(lambda found: "\0" + found.group(), one_line(" ".join(text.split())))
    return _mapped(marked, MARKDOWN).replace("\0", "\\")


def for_latex(text: str) -> str:
    """The text on one line of LaTeX, without commands."""
    return _mapped(one_line(" ".join(text.split())), LATEX)


def _mapped(text: str, table: dict[str, str]) -> str:
    return "".join(table.get(letter, letter) for letter in text)


def _code(letter: str) -> str:
    number = ord(letter)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
