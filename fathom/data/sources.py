"""Where training text comes from (report §4.1): files, folders, and this Python's own standard library.

Reading is deterministic (sorted by path) and never dies of one bad record: what cannot be used is
counted and quoted in `Rejects`. Only a source that gives nothing at all is an error.
"""

from __future__ import annotations

import gzip
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fathom.data import needles
from fathom.errors import DataError

STDLIB = "stdlib"
"""The source name that stands for the standard library of the running Python."""

# Tests and tools that distributions leave out or bundle, and whatever was installed beside it.
_STDLIB_WITHOUT = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "ensurepip",
}
_NEVER_ENTERED = {"__pycache__", "node_modules"}
_TEXT_SUFFIXES = frozenset(
    """
    .txt .md .rst .tex .html .css .py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .java .kt .scala .go .rs
    .js .jsx .ts .tsx .rb .php .pl .lua .r .jl .swift .m .mm .cs .fs .hs .ml .clj .ex .exs .erl .dart
    .zig .sh .bash .sql .toml .yaml .yml .cmake .proto .vue .f90 .asm .s .v .vhd .lean .el .lisp .scm
    """.split()  # noqa: SIM905 (a list would take sixty lines)
)
_QUOTED = 5


@dataclass(frozen=True)
class Document:
    """One text and where it was found (a path relative to its source, with a line for records)."""

    text: str
    source: str


@dataclass
class Rejects:
    """What could not be read: how often, for which reason, with the first few places."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str, place: str, quote: str = "") -> None:
        """Count one reject; `quote` is the beginning of what was found there."""
        self.counts[reason] += 1
        if len(self.examples) < _QUOTED:
            self.examples.append(f"{place}: {reason}" + (f": {quote[:60]!r}" if quote else ""))

    @property
    def total(self) -> int:
        """Files and records rejected."""
        return self.counts.total()

    def summary(self) -> str:
        """One line: "3 rejected (2 not UTF-8 text, 1 broken JSON), e.g. a.bin: not UTF-8 text"."""
        if not self.total:
            return "nothing rejected"
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.counts.most_common())
        return f"{self.total} rejected ({reasons}), e.g. {self.examples[0]}"


def read_documents(source: str | Path, rejects: Rejects) -> Iterator[Document]:
    """Documents of "stdlib", "needles:SIZE", a file or a folder, in an order that depends on nothing but its content.

    Files: text of any known suffix is one document each; .jsonl gives its field "text" per line,
    .parquet its column "text" per row; .gz beside .txt, .md and .jsonl is unpacked. A file that is
    named itself is read as text whatever its suffix. Hidden folders are not entered.
    Raises `DataError` at once for a path that does not exist.
    """
    if str(source) == STDLIB:
        return _read_stdlib(rejects)
    if needles.is_needles(str(source)):
        return (Document(text, str(source)) for text in needles.documents(str(source)))
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, rejects)
    if path.is_file():
        return _read_file(path, path.name, rejects, _reader(path) or _read_text)
    raise DataError(
        f"{str(source)!r} is neither a file nor a folder; give a path that exists, "
        f"or {STDLIB!r} for Python's own library"
    )


def _read_stdlib(rejects: Rejects) -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _walk(root, _STDLIB_WITHOUT):
        if path.suffix == ".py" and not _built_here(path):
            name = f"{STDLIB}/{path.relative_to(root).as_posix()}"
            yield from _read_file(path, name, rejects, _read_text)


def _built_here(path: Path) -> bool:
    """Files that the build writes, with paths of one machine in them."""
    return path.name.startswith("_sysconfigdata") or path.parent.name.startswith("config-")


def _read_folder(root: Path, rejects: Rejects) -> Iterator[Document]:
    for path in _walk(root, set()):
        name = path.relative_to(root).as_posix()
        reader = _reader(path)
        if reader is None:
            rejects.add("not a known kind of text file", name)
        else:
            yield from _read_file(path, name, rejects, reader)


def _walk(root: Path, without: set[str]) -> Iterator[Path]:
    """Files under `root`, sorted by path, hidden ones left out."""
    skipped = _NEVER_ENTERED | without
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if s not in skipped and not s.startswith("."))
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


Reader = Callable[[Path, str, Rejects], Iterator[Document]]


def _reader(path: Path) -> Reader | None:
    """How a file is read, by its suffix; None for a kind that is not known to be text."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        suffix = Path(path.stem).suffix.lower()
        if suffix not in (".txt", ".md", ".jsonl"):
            return None
    if suffix == ".jsonl":
        return _read_jsonl
    if suffix == ".parquet":
        return _read_parquet
    return _read_text if suffix in _TEXT_SUFFIXES else None


def _read_file(path: Path, name: str, rejects: Rejects, reader: Reader) -> Iterator[Document]:
    """Documents of one file; what its bytes do wrong is a reject, what they hold is not checked here."""
    try:
        yield from reader(path, name, rejects)
    except (OSError, EOFError, zlib.error) as error:
        rejects.add("not readable", name, str(error))


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")


def _read_text(path: Path, name: str, rejects: Rejects) -> Iterator[Document]:
    with _open(path) as file:
        content: bytes = file.read()
    text = _decode(content)
    if text is None:
        rejects.add("not UTF-8 text", name)
    elif text.strip():
        yield Document(text, name)


def _decode(content: bytes) -> str | None:
    """UTF-8 with or without its mark; None for anything else. Zero bytes mean a binary file."""
    if b"\0" in content:
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _read_jsonl(path: Path, name: str, rejects: Rejects) -> Iterator[Document]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{name}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                rejects.add("broken JSON", place, line.decode("utf-8", "replace").strip())
                continue
            text = record.get("text") if isinstance(record, dict) else None
            yield from _record(text, place, rejects, line)


def _record(text: object, place: str, rejects: Rejects, quote: bytes = b"") -> Iterator[Document]:
    """The document of one record, if its text is text."""
    if isinstance(text, bytes):
        rejects.add("not UTF-8 text", place, text.decode("utf-8", "replace"))
    elif not isinstance(text, str):
        rejects.add('no text in field "text"', place, quote.decode("utf-8", "replace").strip())
    elif not _encodable(text):
        rejects.add("half a surrogate pair", place, quote.decode("utf-8", "replace").strip())
    elif text.strip():
        yield Document(text, place)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path, name: str, rejects: Rejects) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path} is Parquet, which needs pyarrow; pip install 'fathom[data]'"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                rejects.add('no column "text"', name, ", ".join(file.schema_arrow.names))
                return
            yield from _rows(file, name, rejects)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        rejects.add("not readable as Parquet", name, str(error))


def _rows(file: Any, name: str, rejects: Rejects) -> Iterator[Document]:
    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=["text"]):
        for text in _texts(batch.column(0)):
            number += 1
            yield from _record(text, f"{name}:{number}", rejects)


def _texts(column: Any) -> list[object]:
    """The column's values; text that is not UTF-8 as bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [value and (_decode(value) or value) for value in column.cast("binary").to_pylist()]
