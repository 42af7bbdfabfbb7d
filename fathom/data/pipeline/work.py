"""The folder in which a preparation is made, and which a killed one is continued in.

Every finished piece of work is a folder that was written under another name, synchronised to the disk and renamed: it
is there whole or not at all. The same command finds the pieces and does what is missing; a command with other
settings, or with sources that changed meanwhile, begins anew.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from fathom.errors import DataError
from fathom.files import flush, lock, write_whole

_LOCK, _MARK, _UNFINISHED = ".lock", "mark", ".unfinished-"


class WorkFolder:
    """`path` (beside the folder that is to be made) with the scratch of each step and, in `result`, what stays."""

    def __init__(self, path: Path) -> None:
        self.path, self.result = path, path / "result"
        self._lock: IO[str] | None = None
        self._refused = False
        """Whether another process held the lock when it was last asked for."""

    def claim(self, mark: dict[str, Any]) -> bool:
        """Make it ours, or raise `DataError` when another process is at it. True: goes on from finished work.

        mark: everything that the result depends on.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock_it()
        digest = sha256(json.dumps(mark, sort_keys=True).encode()).hexdigest()
        known = self._read_mark()
        if known != digest:
            self._empty()
            write_whole(self.path / _MARK, digest.encode())
        for left in self.path.rglob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        return known == digest

    def _read_mark(self) -> str:
        try:
            return (self.path / _MARK).read_text()
        except OSError:
            return ""

    def _lock_it(self) -> None:
        try:
            self._lock, self._refused = lock(self.path / _LOCK), False
        except BlockingIOError:
            self._refused = True
            raise DataError(
                f"another process is preparing {self.path}; wait for its end or stop it"
            ) from None

    def _empty(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()

    def piece(self, step: str, name: int | str) -> Path:
        """Where a piece of work of a step lies when it is finished."""
        return self.path / step / (f"{name:06}" if isinstance(name, int) else name)

    def release(self) -> None:
        """Let other processes in."""
        if self._lock is not None:
            self._lock.close()

    def remove(self) -> None:
        """Delete everything, when all is done or nothing came of it; not what another process is at."""
        if self._refused or not self.path.exists():
            return
        if self._lock is None:
            self._lock_it()
        if self._lock is not None and not self._lock.closed:
            shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def finishing(piece: Path) -> Iterator[Path]:
    """A folder to write a piece of work into; it becomes `piece` at the end of the block."""
    unfinished = piece.with_name(f"{_UNFINISHED}{os.getpid()}-{piece.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    synchronise(unfinished)
    try:
        unfinished.rename(piece)
    except OSError:
        if not piece.is_dir():
            raise
        # The last act of a worker whose parent was killed: it has made the same bytes.
        shutil.rmtree(unfinished, ignore_errors=True)


def synchronise(folder: Path) -> None:
    """Have the files of a folder on the disk before a rename makes them count."""
    for path in folder.rglob("*"):
        if path.is_file():
            flush(path)
