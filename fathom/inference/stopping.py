"""Text of an answer as it comes, up to a stop text, and never a part of one.

A token may end in the middle of what could become a stop text; such an end is held back until the
next tokens decide.
"""

from __future__ import annotations

from collections.abc import Sequence

from fathom.data.text_stream import TextStream


class Spoken:
    """The text of one answer; `shown` is all of it that is certain."""

    def __init__(self, text: TextStream, stops: Sequence[str]) -> None:
        self._text, self._stops = text, tuple(stops)
        self._held = ""
        self.shown = ""
        self.stopped_by: str | None = None

    def push(self, token: int) -> str:
        """What the token makes certain; `stopped_by` is set when a stop text is complete."""
        return self._take(self._text.push(token))

    def end(self) -> str:
        """What is left when no more tokens come."""
        if self.stopped_by is not None:
            return ""
        certain = self._take(self._text.flush())
        if self.stopped_by is not None:
            return certain
        held, self._held = self._held, ""
        self.shown += held
        return certain + held

    def _take(self, new: str) -> str:
        text = self._held + new
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            place, self.stopped_by = min(found)
            certain, self._held = text[:place], ""
        else:
            keep = max((_overlap(text, stop) for stop in self._stops), default=0)
            certain, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.shown += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
