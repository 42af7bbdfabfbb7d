"""Which documents are worth training on: plain functions from a text to None (keep it) or to the reason why not.

The report names no filters; these are our choice, after the rules that Gopher (arXiv 2112.11446, table A1) made usual.
None is on by default: what is repetitive for prose is ordinary for tables and code. A filter is chosen by its name,
with its limit behind "=" where the usual one does not fit ("too_short=400"). A filter of one's own is
"path/to/file.py:function": any function that takes a text and gives None or a reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fathom.errors import DataError, did_you_mean
from fathom.files import sha256_of

Filter = Callable[[str], str | None]
_LETTER = re.compile(r"[^\W\d_]")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_LATIN = re.compile("[A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff]")


def too_short(text: str, least: float = 100) -> str | None:
    """Fewer than `least` characters, blanks not counted."""
    count = sum(map(len, text.split()))
    return f"{count} characters, at least {least:g} asked for" if count < least else None


def too_long(text: str, most: float = 5e6) -> str | None:
    """More than `most` characters."""
    return f"{len(text)} characters, at most {most:g} asked for" if len(text) > most else None


def long_lines(text: str, most: float = 1000) -> str | None:
    """Lines of more than `most` characters on average: minified or packed data."""
    lines = text.count("\n") + 1
    mean = len(text) / lines
    return f"{mean:.0f} characters a line, at most {most:g} asked for" if mean > most else None


def mostly_symbols(text: str, least: float = 0.4) -> str | None:
    """Fewer than `least` of all characters but blanks are letters, of whatever script."""
    count = sum(map(len, text.split()))
    share = len(_LETTER.findall(text)) / max(1, count)
    return f"{share:.0%} letters, at least {least:.0%} asked for" if share < least else None


def repeated_lines(text: str, most: float = 0.3) -> str | None:
    """More than `most` of the characters stand in lines that have been there before (Gopher's duplicate lines)."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    share = _repeated(lines)
    return f"{share:.0%} in repeated lines, at most {most:.0%} asked for" if share > most else None


def repeated_words(text: str, most: float = 0.3) -> str | None:
    """More than `most` of all runs of five words, or of ten characters where words are not divided, repeat others."""
    words = text.split()
    size = 5
    if len(_HAN.findall(text)) > len(text) / 5:
        words, size = list("".join(words)), 10
    runs = [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)]
    share = _repeated(runs)
    return f"{share:.0%} repeated runs, at most {most:.0%} asked for" if share > most else None


def _repeated(pieces: list[str]) -> float:
    """Share of the characters in pieces that have been there before."""
    whole = sum(map(len, pieces))
    again = sum((count - 1) * len(piece) for piece, count in Counter(pieces).items())
    return again / max(1, whole)


def latin(text: str, least: float = 0.5) -> str | None:
    """Fewer than `least` of all letters are Latin."""
    return _script(text, _LATIN, "Latin", least)


def han(text: str, least: float = 0.5) -> str | None:
    """Fewer than `least` of all letters are Chinese characters."""
    return _script(text, _HAN, "Chinese", least)


def _script(text: str, script: re.Pattern[str], name: str, least: float) -> str | None:
    share = len(script.findall(text)) / max(1, len(_LETTER.findall(text)))
    return (
        f"{share:.0%} of the letters {name}, at least {least:.0%} asked for"
        if share < least
        else None
    )


FILTERS: dict[str, Callable[..., str | None]] = {
    function.__name__: function
    for function in (
        too_short,
        too_long,
        long_lines,
        mostly_symbols,
        repeated_lines,
        repeated_words,
        latin,
        han,
    )
}


def load_filters(specifications: Sequence[str]) -> list[tuple[str, Filter]]:
    """(name, function) of "NAME", "NAME=LIMIT" and "FILE.py:FUNCTION". Raises `DataError` for what there is not."""
    return [_load(specification) for specification in specifications]


def _load(specification: str) -> tuple[str, Filter]:
    path, _, function = specification.rpartition(":")
    if path.endswith(".py"):
        return function, _from_file(Path(path), function)
    name, sign, limit = specification.partition("=")
    if name not in FILTERS:
        raise DataError(
            f"filter {name!r} is not known; {did_you_mean(name, FILTERS, 'take of')}, or "
            f"give FILE.py:FUNCTION of your own"
        )
    if not sign:
        return name, FILTERS[name]
    try:
        # Every filter's second parameter is its limit.
        return name, partial(_limited, FILTERS[name], float(limit))
    except ValueError:
        raise DataError(
            f"filter {specification!r}: {limit!r} is not a number; write {name}=0.5"
        ) from None


def _limited(function: Callable[..., str | None], limit: float, text: str) -> str | None:
    return function(text, limit)


def _from_file(path: Path, function: str) -> Filter:
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"no filter in {path} ({error.strerror}); give FILE.py:FUNCTION") from error
    names: dict[str, object] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(content, str(path), "exec"), names)
    except Exception as error:  # whatever the user's file raises
        raise DataError(
            f"{path} cannot be run ({type(error).__name__}: {error}); mend it first"
        ) from error
    found = names.get(function)
    if not callable(found):
        raise DataError(
            f"{path} has no function {function!r}; it must take a text and give None or a reason"
        )
    return found


def filter_marks(specifications: Sequence[str]) -> dict[str, str]:
    """sha256 of the files that filters of one's own stand in: a changed filter is another preparation."""
    paths = {s.rpartition(":")[0] for s in specifications if s.rpartition(":")[0].endswith(".py")}
    return {path: sha256_of(Path(path)) for path in sorted(paths)}


def why_dropped(text: str, filters: Sequence[tuple[str, Filter]]) -> tuple[str, str] | None:
    """(name, reason) of the first filter that does not want the text. A filter that fails raises `DataError`."""
    for name, keep in filters:
        try:
            reason = keep(text)
        except Exception as error:  # of the user's function
            raise DataError(
                f"filter {name} failed on a text that begins {text[:60]!r} ({type(error).__name__}: {error})"
            ) from error
        if reason is not None:
            return name, str(reason)
    return None
