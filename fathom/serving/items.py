"""The items of a response as they grow, and the events that tell of it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from fathom.serving.reader import Kind, Piece

Event = dict[str, Any]


class Items:
    """Reasoning, message and calls in the order in which they come; `done` holds them."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._open: Kind | None = None
        self._text = ""

    def add(self, piece: Piece, logprobs: Sequence[Any] = ()) -> list[Event]:
        """What a piece adds, as events."""
        events: list[Event] = []
        kind: Kind = "call" if piece.kind == "arguments" else piece.kind
        if piece.kind == "call" or kind != self._open:
            events += self.close()
            events += self._begin(kind, piece)
        if piece.kind == "call":
            return events
        self._text += piece.text
        return [*events, self._delta(piece.text, logprobs)]

    def close(self, logprobs: Sequence[Any] = ()) -> list[Event]:
        """End the item that is open; a message gets the log-probabilities of all tokens."""
        if self._open is None:
            return []
        kind, text, item = self._open, self._text, self.done[-1]
        item["status"] = "completed"
        here = self._here()
        self._open, self._text = None, ""
        if kind == "call":
            item["arguments"] = text
            name = "response.function_call_arguments.done"
            events = [{"type": name, **here, "name": item["name"], "arguments": text}]
        else:
            part = _part(kind, text, logprobs)
            item["content"] = [part]
            own = {"logprobs": list(logprobs)} if kind == "content" else {}
            here["content_index"] = 0
            events = [
                {"type": f"response.{_TEXT[kind]}.done", **here, "text": text, **own},
                {"type": "response.content_part.done", **here, "part": part},
            ]
        place = len(self.done) - 1
        return [*events, {"type": "response.output_item.done", "output_index": place, "item": item}]

    def _begin(self, kind: Kind, piece: Piece) -> list[Event]:
        item = _item(kind, piece.text)
        self.done.append(item)
        self._open = kind
        place = len(self.done) - 1
        added = {"type": "response.output_item.added", "output_index": place, "item": dict(item)}
        if kind == "call":
            return [added]
        here = {**self._here(), "content_index": 0}
        return [added, {"type": "response.content_part.added", **here, "part": _part(kind, "", ())}]

    def _delta(self, text: str, logprobs: Sequence[Any]) -> Event:
        if self._open == "call":
            name = "response.function_call_arguments.delta"
            return {"type": name, **self._here(), "delta": text}
        assert self._open is not None
        own = {"logprobs": list(logprobs)} if self._open == "content" else {}
        name = f"response.{_TEXT[self._open]}.delta"
        return {"type": name, **self._here(), "content_index": 0, "delta": text, **own}

    def _here(self) -> dict[str, Any]:
        return {"item_id": self.done[-1]["id"], "output_index": len(self.done) - 1}


_TEXT = {"reasoning": "reasoning_text", "content": "output_text"}


def _item(kind: Kind, name: str) -> dict[str, Any]:
    token = secrets.token_hex(12)
    if kind == "call":
        return {
            "type": "function_call",
            "id": f"fc_{token}",
            "call_id": f"call_{token}",
            "name": name,
            "arguments": "",
            "status": "in_progress",
        }
    if kind == "reasoning":
        return {
            "type": "reasoning",
            "id": f"rs_{token}",
            "summary": [],
            "content": [],
            "status": "in_progress",
        }
    return {
        "type": "message",
        "id": f"msg_{token}",
        "role": "assistant",
        "content": [],
        "status": "in_progress",
    }


def _part(kind: Kind, text: str, logprobs: Sequence[Any]) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
