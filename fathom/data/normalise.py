"""Cleaning text before anything is counted: plain functions from text to text, chosen by name.

By default only what is no text at all goes: a byte order mark, zero characters. Everything else can mean something in
source code (carriage returns in a test file, blanks at a line's end in Markdown, decomposed letters in a string), so
it is left alone unless asked for. For prose "nfc" and "line_ends" are what most pipelines do.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from fathom.errors import DataError, did_you_mean

Normalise = Callable[[str], str]


def mark(text: str) -> str:
    """Without the byte order mark at its beginning."""
    return text.removeprefix("\ufeff")


def zeros(text: str) -> str:
    """Without U+0000."""
    return text.replace("\0", "")


def nfc(text: str) -> str:
    """Letters and their accents composed (Unicode NFC)."""
    return unicodedata.normalize("NFC", text)


def line_ends(text: str) -> str:
    """Windows' and old Macs' line ends as line feeds."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def trailing_blanks(text: str) -> str:
    """Without blanks and tabs at the ends of lines."""
    return re.sub(r"[ \t]+(?=\r?\n|\Z)", "", text)


def blank_lines(text: str) -> str:
    """At most two line feeds, thus one empty line, in a row."""
    return re.sub(r"\n{3,}", "\n\n", text)


NORMALISATIONS: dict[str, Normalise] = {
    function.__name__: function
    for function in (mark, zeros, nfc, line_ends, trailing_blanks, blank_lines)
}
DEFAULT_NORMALISATION = ("mark", "zeros")


def check_normalisations(names: Sequence[str]) -> None:
    """Raises `DataError` for a name that there is not."""
    for name in names:
        if name not in NORMALISATIONS:
            raise DataError(
                f"normalisation {name!r} is not known; {did_you_mean(name, NORMALISATIONS, 'take of')}"
            )


def normalised(text: str, names: Sequence[str]) -> str:
    """`text` after the named functions in their order."""
    for name in names:
        text = NORMALISATIONS[name](text)
    return text
