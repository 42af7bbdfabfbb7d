"""Text from ids that arrive one by one, as a model writes them (report §3.4): no half characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextStream:
    """Ids in, text out as soon as its characters are complete; all pushes and `flush` together equal `decode`."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        # The last ids shown, and decoded again before the next: some decoders treat a text's beginning differently.
        self._shown: list[int] = []
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that became complete with this token, often nothing while a character's bytes arrive."""
        self._waiting.append(token)
        text = self._text()
        return "" if text.endswith("\ufffd") else self._show(text)

    def flush(self) -> str:
        """What is still waiting, with U+FFFD for bytes that never became a character."""
        return self._show(self._text())

    def _text(self) -> str:
        before = self._decode(self._shown)
        return self._decode(self._shown + self._waiting)[len(before) :]

    def _show(self, text: str) -> str:
        if self._waiting:
            self._shown, self._waiting = self._waiting, []
        return text
