"""One answer as it is put together for a client, and what several took."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fathom.inference import Delta, Ended, Request
from fathom.inference.choice import Logprob
from fathom.serving.reader import Piece, Reader


@dataclass
class ToolCall:
    """A call of a function; its arguments are the text that the model wrote, which may be no JSON."""

    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    @property
    def body(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass
class Answer:
    """What has been said so far."""

    reader: Reader
    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    ended: Ended | None = None

    def take(self, delta: Delta) -> list[Piece]:
        """What a step adds."""
        pieces = self.reader.push(delta.token_ids, delta.text)
        if delta.ended is not None:
            pieces += self.reader.end()
            self.ended = delta.ended
        for piece in pieces:
            self._add(piece)
        self.logprobs += said(delta)
        return pieces

    def _add(self, piece: Piece) -> None:
        match piece.kind:
            case "reasoning":
                self.reasoning += piece.text
            case "content":
                self.content += piece.text
            case "call":
                self.calls.append(ToolCall(piece.text))
            case "arguments":
                self.calls[-1].arguments += piece.text

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's word for why it ended."""
        if self.ended is None:
            return None
        return "tool_calls" if self.ended is Ended.STOP and self.calls else str(self.ended)


def said(delta: Delta) -> list[Logprob]:
    """A step's log-probabilities, without that of the token that ended the answer: it is no part of its text."""
    ended_by_token = delta.ended is not None and isinstance(delta.request.stopped_by, int)
    return delta.logprobs[:-1] if ended_by_token else delta.logprobs


def usage_of(requests: Sequence[Request], reasoning_tokens: int = 0) -> dict[str, Any]:
    """OpenAI's `usage`. The tokens of drafts are its "prediction" tokens."""
    prompts = [request.usage for request in requests if request.choice == 0]
    all_ = [request.usage for request in requests]
    prompt = sum(usage.prompt_tokens for usage in prompts)
    completion = sum(usage.completion_tokens for usage in all_)
    accepted = sum(sum(usage.accepted) for usage in all_)
    drafted = sum(sum(usage.drafted) for usage in all_)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in prompts)},
        "completion_tokens_details": {
            "reasoning_tokens": reasoning_tokens,
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
    }
