"""How far long work on text is: how much is done, how fast, and the time left.

Where it is known how much there is, the time left follows from the rate. Learning a vocabulary (report §4.1) has two
phases. Pieces are counted while the texts are read, and there it does too. Merging happens inside the library, which
tells nothing: a thread says how long it has taken so far.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType

Say = Callable[[str], None]
"""What is called with a line of text."""
EVERY = 5.0
"""Seconds between two lines about learning a vocabulary."""
_SHOWN_EVERY = 0.5


def silent(line: str) -> None:
    """A `Say` for whoever does not want to know."""


class Progress:
    """Says how much of `total` is done, at which rate and until when: bytes, shown as MB, or things called `unit`."""

    def __init__(self, what: str, total: int, show: Say, unit: str = "MB") -> None:
        self.what, self.total, self.show, self.unit = what, total, show, unit
        self.done = self.before = 0
        self.began = time.monotonic()
        self.shown = self.began
        show(f"{what} …")  # what was shown before is over

    def skip(self, size: int) -> None:
        """What was done by an earlier process."""
        self.done += size
        self.before += size

    def add(self, size: int) -> None:
        """What is done now."""
        self.done += size
        now = time.monotonic()
        if now - self.shown >= _SHOWN_EVERY:
            self.shown = now
            self.show(self.line(now - self.began))

    def line(self, seconds: float) -> str:
        """ "reading: 120 of 800 MB, 35.0 MB/s, 0:19 left"."""
        rate = (self.done - self.before) / seconds
        left = max(0, self.total - self.done) / rate if rate else 0
        size = 1e6 if self.unit == "MB" else 1
        return (
            f"{self.what}: {self.done / size:,.0f} of {self.total / size:,.0f} {self.unit}, "
            f"{rate / size:,.1f} {self.unit}/s, {_clock(left)} left"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


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
