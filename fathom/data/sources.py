"""Where training text comes from (report §4.1): files, folders, data sets, and this Python's own standard library.

A source is written "PATH" or "NAME=PATH". Its name is what mixture weights and reports call it. Reading is
deterministic (files sorted by path) and never dies of one bad record: what cannot be used is counted and quoted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fathom.data.readers import PartReader
from fathom.data.rejects import Reject, Rejects
from fathom.data.units import HUB, STDLIB, as_text, files_of, parts_of
from fathom.errors import DataError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Document:
    """One text and where it was found (a path relative to its source, with a line for records)."""

    text: str
    source: str


@dataclass(frozen=True)
class Source:
    """A named source; `path` is a file, a folder, "stdlib" or "hf:NAME[:CONFIG][:SPLIT]"."""

    name: str
    path: str


def parse_sources(specifications: Sequence[str]) -> list[Source]:
    """Sources of "PATH" or "NAME=PATH", names made distinct. Raises `DataError` for a name used twice or misspelt."""
    sources: list[Source] = []
    for specification in map(str, specifications):
        name, path = _divide(specification)
        taken = {source.name for source in sources}
        if name and name in taken:
            raise DataError(
                f"two sources are called {name!r}; give each a NAME of its own: NAME=PATH"
            )
        sources.append(Source(name or _free(_usual_name(path), taken), path))
    return sources


def _divide(specification: str) -> tuple[str, str]:
    """(NAME or "", PATH). What exists under the whole text is a path, also with a "=" in it."""
    if as_text(specification) != specification:
        raise DataError(
            f"the source {as_text(specification)!r} is not UTF-8; rename it, or name the folder that it lies in"
        )
    name, sign, path = specification.partition("=")
    if not sign or "/" in name or Path(specification).exists():
        name, path = "", specification
    elif not _NAME.fullmatch(name):
        raise DataError(
            f"the source name {name!r} is not usable; take letters, digits, '_', '-' and '.', as in web=PATH"
        )
    elif name.endswith((".json", ".jsonl")):
        raise DataError(
            f"the source name {name!r} could be one of the prepared folder's own files; take one without its ending"
        )
    return name, path if path == STDLIB or path.startswith(HUB) else str(Path(path))


def _usual_name(path: str) -> str:
    """A file without its endings, a folder's own name, a data set's name."""
    if path.startswith(HUB):
        path = path[len(HUB) :].split(":")[0]
    found = Path(path).resolve() if path in (".", "..") else Path(path)
    stem = found.name if found.is_dir() else found.name.split(".")[0]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.") or "text"


def _free(name: str, taken: set[str]) -> str:
    number = 2
    free = name
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free


def read_documents(source: str | Path, rejects: Rejects) -> Iterator[Document]:
    """Documents of one source ("PATH" as above), one after the other, as `prepare` finds them.

    Text of any known suffix is one document each; .jsonl gives its field "text" per line, .parquet and Hugging Face
    data sets their column "text" per row; .gz and .zst beside .txt, .md and .jsonl are unpacked. A file that is
    named itself is read as text whatever its suffix. Hidden folders are not entered.
    Raises `DataError` at once for a path that does not exist.
    """
    files = files_of(str(source), rejects)
    return (found for file in files for found in _documents(file.name, parts_of(file), rejects))


def _documents(name: str, parts: Sequence, rejects: Rejects) -> Iterator[Document]:
    line = 0
    for part in parts:
        reader = PartReader(part)
        for row, found in reader:
            place = f"{name}:{line + row}" if row else name
            if isinstance(found, Reject):
                rejects.add(found.reason, place, found.quote)
            else:
                yield Document(found, place)
        line += reader.rows
