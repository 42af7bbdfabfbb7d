"""First pass: from files to clean text on the disk, with a line of index per document.

What a unit gives lies in one folder: `text.bin` (all texts, UTF-8, one after the other), `index.bin` (`DOCUMENT`), with
near-duplicate removal `signatures.bin` (uint32 [documents, PLACES]), `rejects.jsonl` and `counts.json`. Later passes
read these and never the sources again, so that a source may change meanwhile without harm.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fathom.data.filters import load_filters, why_dropped
from fathom.data.normalise import normalised
from fathom.data.pipeline.signatures import PLACES, signatures
from fathom.data.pipeline.work import finishing
from fathom.data.readers import PartReader
from fathom.data.rejects import QUOTED, Reject
from fathom.data.split import Split
from fathom.data.units import Unit

DOCUMENT = np.dtype(
    [
        ("start", "<i8"),  # in text.bin
        ("bytes", "<i8"),
        ("side", "<u8"),  # the two halves of the content's hash, see `Split`
        ("order", "<u8"),
        ("file", "<i4"),  # number within the source
        ("row", "<i8"),  # from 1 within the unit's stretch of the file, 0 for a whole file
    ]
)
_SIGNED_AT_ONCE = 1_000_000  # characters
_INDEXED_AT_ONCE = 10_000


@dataclass(frozen=True)
class ReadJob:
    """What is done with every text before it counts."""

    normalise: tuple[str, ...]
    filters: tuple[str, ...]
    split: Split
    near: bool
    """Whether signatures are needed."""


def read_unit(job: ReadJob, unit: Unit, piece: Path) -> int:
    """Read one unit into the folder `piece`; gives the bytes read."""
    with finishing(piece) as folder, _Writer(job, folder) as writer:
        rows: Counter[int] = Counter()
        for file, part in zip(unit.files, unit.parts, strict=True):
            reader = PartReader(part)
            for row, found in reader:
                writer.add(file, row and rows[file] + row, found)
            rows[file] += reader.rows
            writer.blank += reader.blank
        writer.finish(rows)
    return unit.bytes


@dataclass
class _Writer:
    """The files of one unit while they are written."""

    job: ReadJob
    folder: Path
    index: list[tuple] = field(default_factory=list)
    rejects: Counter[str] = field(default_factory=Counter)
    filters: Counter[str] = field(default_factory=Counter)
    unsigned: list[str] = field(default_factory=list)
    size: int = 0
    blank: int = 0

    def __enter__(self) -> _Writer:
        self.keep = load_filters(self.job.filters)
        self.text = (self.folder / "text.bin").open("wb")
        self.lines = (self.folder / "rejects.jsonl").open("w", encoding="utf-8")
        self.signed = (self.folder / "signatures.bin").open("wb")
        self.entries = (self.folder / "index.bin").open("wb")
        return self

    def __exit__(self, *_: Any) -> None:
        for file in (self.text, self.lines, self.signed, self.entries):
            file.close()

    def add(self, file: int, row: int, found: str | Reject) -> None:
        """One record: a document, or a line among the rejects."""
        if isinstance(found, Reject):
            self.rejects[found.reason] += 1
            self._reject("unreadable", found.reason, found.quote, file, row)
            return
        text = normalised(found, self.job.normalise)
        why = why_dropped(text, self.keep)
        if why:
            self.filters[why[0]] += 1
            self._reject(f"filter {why[0]}", why[1], text, file, row)
        elif text.strip():
            self._keep(text, file, row)
        else:
            self.blank += 1

    def _reject(self, kind: str, reason: str, text: str, file: int, row: int) -> None:
        line = {"file": file, "row": row, "kind": kind, "reason": reason, "quote": text[:QUOTED]}
        self.lines.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _keep(self, text: str, file: int, row: int) -> None:
        content = text.encode()
        self.index.append((self.text.tell(), len(content), *self.job.split.hash(text), file, row))
        self.text.write(content)
        if len(self.index) >= _INDEXED_AT_ONCE:
            self._write_index()
        if self.job.near:
            self.unsigned.append(text)
            self.size += len(text)
            if self.size >= _SIGNED_AT_ONCE:
                self._sign()

    def _write_index(self) -> None:
        self.entries.write(np.array(self.index, DOCUMENT).tobytes())
        self.index = []

    def _sign(self) -> None:
        if self.unsigned:
            self.signed.write(signatures(self.unsigned).tobytes())
            self.unsigned, self.size = [], 0

    def finish(self, rows: Counter[int]) -> None:
        """Write what is known at the end."""
        self._sign()
        self._write_index()
        counts: dict[str, Any] = {"rows": rows, "rejects": self.rejects, "filters": self.filters}
        counts["blank"] = {"blank": self.blank}
        (self.folder / "counts.json").write_text(json.dumps(counts), encoding="utf-8")


class Corpus:
    """What the first pass left of all units, in reading order; texts stay on the disk."""

    def __init__(self, units: list[Unit], pieces: list[Path]) -> None:
        self.units, self.pieces = units, pieces
        indices = [np.fromfile(piece / "index.bin", DOCUMENT) for piece in pieces]
        self.index = np.concatenate([np.empty(0, DOCUMENT), *indices])
        """`DOCUMENT` of every document, rows counted from the beginning of their file."""
        self.first = np.cumsum([0, *map(len, indices)])
        """First document of each unit, and their number."""
        self.counts = [json.loads((piece / "counts.json").read_text()) for piece in pieces]
        self.first_rows = self._first_rows()
        for i, first_row in enumerate(self.first_rows):
            stretch = self.index[self.first[i] : self.first[i + 1]]
            begun_before = (stretch["file"] == units[i].files[0]) & (stretch["row"] > 0)
            stretch["row"] += begun_before * first_row

    def _first_rows(self) -> list[int]:
        """For each unit, the rows that its first file has in the units before."""
        seen: Counter[tuple[int, int]] = Counter()
        found = []
        for unit, counts in zip(self.units, self.counts, strict=True):
            found.append(seen[unit.source, unit.files[0]])
            for file, rows in counts["rows"].items():
                seen[unit.source, int(file)] += rows
        return found

    def sources(self) -> np.ndarray:
        """int64 [documents]: the source of each."""
        return np.repeat([unit.source for unit in self.units], np.diff(self.first)).astype(np.int64)

    def texts(self, documents: np.ndarray) -> Iterator[str]:
        """Texts of some documents, given in reading order."""
        for unit, piece in enumerate(self.pieces):
            low, high = np.searchsorted(documents, self.first[unit : unit + 2])
            if low < high:
                yield from read_texts(piece, self.index[documents[low:high]])

    def signatures(self, path: Path) -> np.ndarray:
        """uint32 [documents, PLACES] of all units, joined in the file `path`, as a memory map."""
        with open(path, "wb") as file:
            for piece in self.pieces:
                with open(piece / "signatures.bin", "rb") as part:
                    shutil.copyfileobj(part, file, 1 << 20)
        return np.memmap(path, np.uint32, "r", shape=(len(self.index), PLACES))

    def counted(self, what: str, source: int | None = None) -> Counter[str]:
        """ "rejects", "filters" or "blank" of one source or all, by reason."""
        pairs = zip(self.units, self.counts, strict=True)
        chosen = (counts[what] for unit, counts in pairs if source in (None, unit.source))
        return sum((Counter(counts) for counts in chosen), Counter())


def read_texts(piece: Path, entries: np.ndarray) -> Iterator[str]:
    """The texts of entries of a unit's index."""
    with open(piece / "text.bin", "rb") as file:
        for entry in entries:
            file.seek(entry["start"])
            yield file.read(entry["bytes"]).decode()
