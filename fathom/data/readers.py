"""Reading one part of a file, record by record: text, .jsonl, Parquet, data sets; .gz and .zst unpacked on the way.

Each record is a text or a `Reject` with its reason; a file that breaks off gives what it held up to there and one
reject more. Nothing here raises for what a file holds.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from fathom.data import needles
from fathom.data.rejects import QUOTED, Reject
from fathom.data.units import File, Part
from fathom.errors import DataError

Found = str | Reject
_FIELD = "text"


class PartReader:
    """The records of a part as (row, text or reject); row counts lines or rows of the part from 1, 0 is a whole file.

    Once all is read, `rows` is the number of lines or rows the part has, so that the next part's can be numbered on,
    and `blank` how many of them, or files, hold nothing but blanks.
    """

    def __init__(self, part: Part) -> None:
        self.part, self.rows, self.blank = part, 0, 0

    def __iter__(self) -> Iterator[tuple[int, Found]]:
        read = {
            "text": self._text,
            "jsonl": self._jsonl,
            "parquet": self._parquet,
            "dataset": self._dataset,
            "needles": self._needles,
        }[self.part.kind]
        try:
            yield from read()
        except (OSError, EOFError, zlib.error) as error:
            yield self.rows, Reject("not readable", str(error))

    def _text(self) -> Iterator[tuple[int, Found]]:
        with _open(self.part.path) as file:
            content: bytes = file.read()
        text = _decode(content)
        if text is None:
            yield 0, Reject("not UTF-8 text", content[:QUOTED].decode("utf-8", "replace"))
        elif text.strip():
            yield 0, text
        else:
            self.blank += 1

    def _jsonl(self) -> Iterator[tuple[int, Found]]:
        for line in _lines(self.part):
            self.rows += 1
            if not line.strip():
                self.blank += 1
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                yield self.rows, Reject("broken JSON", _quote(line))
                continue
            text = record.get(_FIELD) if isinstance(record, dict) else None
            yield from self._numbered(_record(text, line))

    def _parquet(self) -> Iterator[tuple[int, Found]]:
        pyarrow, parquet = _pyarrow(self.part.path)
        try:
            with parquet.ParquetFile(self.part.path) as file:
                names = file.schema_arrow.names
                if _FIELD not in names:
                    yield 0, Reject(f'no column "{_FIELD}"', ", ".join(names))
                    return
                groups = list(range(file.num_row_groups))[self.part.start : self.part.stop]
                for batch in file.iter_batches(1024, row_groups=groups, columns=[_FIELD]):
                    yield from self._column(batch.column(0))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
            yield self.rows, Reject("not readable as Parquet", str(error))

    def _dataset(self) -> Iterator[tuple[int, Found]]:
        from fathom.data.datasets_hub import open_dataset

        rows = open_dataset(self.part.path)
        if _FIELD not in rows.column_names:
            yield 0, Reject(f'no column "{_FIELD}"', ", ".join(rows.column_names))
            return
        rows = rows.select_columns([_FIELD]).with_format("arrow")
        stop = len(rows) if self.part.stop is None else self.part.stop
        for first in range(self.part.start, stop, 1024):
            table = rows[first : min(first + 1024, stop)]
            for chunk in table.column(0).chunks:
                yield from self._column(chunk)

    def _needles(self) -> Iterator[tuple[int, Found]]:
        for text in needles.documents(self.part.path):
            self.rows += 1
            yield self.rows, text

    def _column(self, column: Any) -> Iterator[tuple[int, Found]]:
        for text in _texts(column):
            self.rows += 1
            yield from self._numbered(_record(text))

    def _numbered(self, found: Found | None) -> Iterator[tuple[int, Found]]:
        if found is None:
            self.blank += 1
        else:
            yield self.rows, found


def needed_packages(files: Iterable[File]) -> None:
    """Import what reading these files will need. Raises `DataError` for what is not installed."""
    for file in files:
        if file.kind == "parquet":
            _pyarrow(file.path)
        elif file.path.lower().endswith(".zst"):
            _zstandard(file.path)


def count_rows(path: str, kind: str) -> int:
    """Row groups of a Parquet file, rows of a data set; one for a file that cannot be opened."""
    if kind == "dataset":
        from fathom.data.datasets_hub import open_dataset

        return len(open_dataset(path))
    pyarrow, parquet = _pyarrow(path)
    try:
        with parquet.ParquetFile(path) as file:
            return max(1, file.num_row_groups)
    except (OSError, pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        return 1


def _lines(part: Part) -> Iterator[bytes]:
    """Lines that begin within the part. One that is longer than a part is read by the part that it begins in alone."""
    with _open(part.path) as file:
        at = part.start
        if at:  # the line that the part before began is its own
            file.seek(at - 1)
            rest = file.readline(-1 if part.stop is None else part.stop - at + 1)
            if not rest.endswith(b"\n"):
                return
            at += len(rest) - 1
        while part.stop is None or at < part.stop:
            line = file.readline()
            if not line:
                return
            at += len(line)
            yield line


def _open(path: str) -> Any:
    if path.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.lower().endswith(".zst"):
        return _open_zst(path)
    return open(path, "rb")


def _open_zst(path: str) -> Any:
    return io.BufferedReader(_Unpacked(path, _zstandard(path)), 1 << 20)


def _zstandard(path: str) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f"{path} is packed with zstd, which needs zstandard; pip install 'fathom[data]'"
        ) from error
    return zstandard


class _Unpacked(io.RawIOBase):
    """The bytes of a .zst file of one frame or more; one that breaks off raises `EOFError`, a broken one `OSError`."""

    def __init__(self, path: str, zstandard: Any) -> None:
        self._error = zstandard.ZstdError
        self._begin = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._file = open(path, "rb")  # noqa: SIM115 (closed with this)
        self._frame: Any = None
        self._packed = b""
        self._ready = memoryview(
            b""
        )  # a slice of which copies nothing, however far a block unpacks

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(1 << 17)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._unpack()
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)], self._ready = taken, self._ready[len(taken) :]
        return len(taken)

    def _unpack(self) -> None:
        self._frame = self._frame or self._begin()
        try:
            self._ready = memoryview(self._frame.decompress(self._packed))
        except self._error as error:
            raise OSError(str(error)) from error
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None

    def close(self) -> None:
        self._file.close()
        super().close()


def _decode(content: bytes) -> str | None:
    """UTF-8 with or without its mark; None for anything else. Zero bytes mean a binary file."""
    if b"\0" in content:
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _record(text: object, line: bytes = b"") -> Found | None:
    """The text of one record if it is text, None if it is blank."""
    if isinstance(text, bytes):
        return Reject("not UTF-8 text", _quote(text))
    if not isinstance(text, str):
        return Reject(f'no text in field "{_FIELD}"', _quote(line))
    if not _encodable(text):
        return Reject("half a surrogate pair", _quote(line))
    return text if text.strip() else None


def _quote(content: bytes) -> str:
    return content[: 4 * QUOTED].decode("utf-8", "replace").strip()[:QUOTED]


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _pyarrow(path: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path} is Parquet, which needs pyarrow; pip install 'fathom[data]'"
        ) from error
    return pyarrow, parquet


def _texts(column: Any) -> list[object]:
    """The column's values; text that is not UTF-8 as bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [value and (_decode(value) or value) for value in column.cast("binary").to_pylist()]
