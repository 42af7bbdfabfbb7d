"""Files that are there whole or not at all, whenever a process is killed; for every package that writes some."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO

UNFINISHED = ".writing"
"""How the name of a file ends while `write_whole` writes it; a dot stands before it."""


def flush(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file: it has its old content or the new one, never a part."""
    unfinished = path.with_name(f".{path.name}{UNFINISHED}")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(path: Path) -> IO[str]:
    """The lock file `path`, held until it is closed or this process ends, however it ends.

    Raises `BlockingIOError` when another process holds it. A file system without locks keeps nobody out.
    """
    import fcntl  # not on every system

    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except OSError:  # no locks here
        pass
    return file
