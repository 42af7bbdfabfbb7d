"""How far learning a vocabulary is (report §4.1): what was read, how fast, and the time left.

It has two phases. Pieces are counted while the texts are read, and there the time left follows from the bytes still to
come. Merging happens inside the library, which tells nothing: a thread says how long it has taken so far.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType

Say = Callable[[str], None]
EVERY = 5.0
"""Seconds between two lines."""


class TrainingProgress:
    """A context around the training; `say` None says nothing."""

    def __init__(
        self, say: Say | None, total_bytes: int | None = None, every: float = EVERY
    ) -> None:
        self._say = say
        self._total = total_bytes
        self._every = every
        self._over = threading.Event()
        self._merging: threading.Thread | None = None

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._merging:
            self._merging.join()

    def reading(self, texts: Iterable[str]) -> Iterator[str]:
        """`texts` as they come; merging begins when they end."""
        if self._say is None:
            yield from texts
        else:
            yield from self._counted(texts, self._say)
            self._merging = threading.Thread(target=self._tell, args=(self._say,), daemon=True)
            self._merging.start()

    def _counted(self, texts: Iterable[str], say: Say) -> Iterator[str]:
        began = said = time.monotonic()
        read = 0
        for text in texts:
            yield text
            read += len(text.encode())
            now = time.monotonic()
            if now - said >= self._every:
                say(reading_line(read, now - began, self._total))
                said = now
        say(reading_line(read, time.monotonic() - began, None) + ", all read; merging")

    def _tell(self, say: Say) -> None:
        began = time.monotonic()
        while not self._over.wait(self._every):
            say(f"merging for {time.monotonic() - began:.0f} s")


def reading_line(read: int, seconds: float, total: int | None) -> str:
    """One line about `read` bytes in `seconds`, with the time left for `total` bytes."""
    rate = read / max(seconds, 1e-9)
    line = f"counted the pieces of {read / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s"
    if total and read:
        line += f", {max(total - read, 0) / rate:.0f} s left"
    return line
