"""Which files a source has, and how they are cut into units of work.

A unit is what one worker reads at a time: some small files together, or a stretch of a large one. Units depend on the
files alone, never on the number of workers, so that a preparation that was killed finds its finished units again.
Lines of .jsonl can be cut anywhere: a line belongs to the part in which it begins. Packed streams (.gz, .zst) cannot
be entered in the middle, so each is one part; Parquet is cut at row groups, data sets at rows.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fathom.data.needles import is_needles
from fathom.data.rejects import Rejects
from fathom.errors import DataError

STDLIB = "stdlib"
"""The source name that stands for the standard library of the running Python."""
HUB = "hf:"
"""How a Hugging Face data set is named: hf:NAME[:CONFIG][:SPLIT]."""
UNIT_BYTES = 8_000_000

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
_PACKED = (".gz", ".zst")
SAVED_DATASET = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class File:
    """One file (or data set) of a source: where it is, what rejects and documents call it, how it is read."""

    path: str
    name: str
    kind: str
    """"text", "jsonl", "parquet", "dataset", or "needles", which is made and not read."""
    size: int
    """Bytes on the disk; of a data set, of its table."""
    stamp: int
    """Its time of change in nanoseconds, or what tells a data set from a newer one."""


@dataclass(frozen=True)
class Part:
    """What of a file is read: all of it, or from `start` to `stop` (bytes, row groups or rows)."""

    path: str
    kind: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Unit:
    """Parts that are read together; `files[i]` is the number, within its source, of the file of `parts[i]`."""

    source: int
    files: tuple[int, ...]
    parts: tuple[Part, ...]
    bytes: int


def files_of(source: str, rejects: Rejects) -> list[File]:
    """Files of a source, in reading order; what is no text is a reject. Raises `DataError` for a missing path."""
    if source == STDLIB:
        return list(_stdlib())
    if is_needles(source):
        return [File(source, source, "needles", 0, 0)]
    path = Path(source)
    if source.startswith(HUB) or any((path / name).is_file() for name in SAVED_DATASET):
        from fathom.data.datasets_hub import dataset_file

        return [dataset_file(source)]
    if path.is_dir():
        return list(_folder(path, rejects))
    if path.is_file():
        return [_file(path, as_text(path.name), kind_of(path) or "text")]
    raise DataError(
        f"{source!r} is neither a file nor a folder; give a path that exists, {STDLIB!r} for Python's own "
        f"library, or {HUB}NAME for a Hugging Face data set"
    )


def kind_of(path: Path) -> str | None:
    """How a file is read, by its suffix; None for a kind that is not known to be text."""
    suffix = path.suffix.lower()
    if suffix in _PACKED:
        suffix = Path(path.stem).suffix.lower()
        if suffix not in (".txt", ".md", ".jsonl"):
            return None
    if suffix in (".jsonl", ".parquet"):
        return suffix[1:]
    return "text" if suffix in _TEXT_SUFFIXES else None


def as_text(name: str) -> str:
    """A file's name with bytes that are no UTF-8 as \\udc.., so that it can be shown and written down."""
    return name.encode("utf-8", "backslashreplace").decode()


def _file(path: Path, name: str, kind: str) -> File:
    found = path.stat()
    return File(str(path), name, kind, found.st_size, found.st_mtime_ns)


def _folder(root: Path, rejects: Rejects) -> Iterator[File]:
    for path in _walk(root, set(), rejects):
        name, kind = as_text(path.relative_to(root).as_posix()), kind_of(path)
        if kind is None:
            rejects.add("not a known kind of text file", name)
            continue
        if path.exists() and not path.is_file():  # a pipe: opening it may never end
            rejects.add("not a file", name)
            continue
        try:
            yield _file(path, name, kind)
        except OSError as error:  # a link that leads nowhere
            rejects.add("not readable", name, as_text(str(error)))


def _stdlib() -> Iterator[File]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _walk(root, _STDLIB_WITHOUT, Rejects()):
        if path.suffix == ".py" and not _built_here(path):
            yield _file(path, f"{STDLIB}/{path.relative_to(root).as_posix()}", "text")


def _built_here(path: Path) -> bool:
    """Files that the build writes, with paths of one machine in them."""
    return path.name.startswith("_sysconfigdata") or path.parent.name.startswith("config-")


def _walk(root: Path, without: set[str], rejects: Rejects) -> Iterator[Path]:
    """Files under `root`, sorted by path, hidden ones left out. Links to folders, which may lead in circles, are
    rejects like folders that cannot be read."""
    skipped = _NEVER_ENTERED | without

    def told(error: OSError) -> None:
        rejects.add("folder not readable", as_text(str(error.filename)), error.strerror or "")

    for folder, subfolders, files in os.walk(root, onerror=told):
        subfolders[:] = sorted(s for s in subfolders if s not in skipped and not s.startswith("."))
        for link in (s for s in subfolders if Path(folder, s).is_symlink()):
            name = as_text(Path(folder, link).relative_to(root).as_posix())
            rejects.add("link to a folder, not followed", name)
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


def parts_of(file: File, size: int = UNIT_BYTES) -> list[Part]:
    """A file in parts of about `size` bytes where its kind can be cut, else whole."""
    packed = file.path.lower().endswith(_PACKED)
    if file.size <= size or packed or file.kind == "text":
        return [Part(file.path, file.kind)]
    last = file.size
    if file.kind in ("parquet", "dataset"):
        from fathom.data.readers import count_rows

        last = count_rows(file.path, file.kind)
    step = max(1, size if file.kind == "jsonl" else last * size // file.size)
    return [Part(file.path, file.kind, at, min(at + step, last)) for at in range(0, last, step)]


def units_of(source: int, files: Iterable[File], size: int = UNIT_BYTES) -> Iterator[Unit]:
    """All parts of a source's files in their order, small ones together up to `size` bytes."""
    numbers: list[int] = []
    parts: list[Part] = []
    together = 0
    for number, file in enumerate(files):
        cut = parts_of(file, size)
        share = file.size // len(cut)
        for part in cut:
            if parts and together + share > size:
                yield Unit(source, tuple(numbers), tuple(parts), together)
                numbers, parts, together = [], [], 0
            numbers.append(number)
            parts.append(part)
            together += share
    if parts:
        yield Unit(source, tuple(numbers), tuple(parts), together)
