"""What the engine says: what a step added, whole answers, and counts of all it has done."""

from __future__ import annotations

from dataclasses import dataclass, field

from fathom.inference.choice import Logprob
from fathom.inference.request import Ended, Request, Usage


@dataclass(frozen=True)
class Delta:
    """What one step added to one answer."""

    request: Request
    token_ids: list[int]
    text: str
    """Text that became certain; empty while a character or a possible stop text is incomplete."""
    logprobs: list[Logprob]
    ended: Ended | None


@dataclass(frozen=True)
class Output:
    """One answer."""

    prompt_index: int
    choice: int
    prompt_ids: list[int]
    token_ids: list[int]
    """All tokens that the model chose, the one that ended the answer too."""
    text: str | None
    """Without end and stop texts; None without a tokenizer."""
    logprobs: list[Logprob] | None
    prompt_logprobs: list[Logprob | None] | None
    finish_reason: str
    stopped_by: int | str | None
    """The token or text that ended it."""
    usage: Usage


@dataclass
class Counts:
    """What the engine has done since it was made."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    preemptions: int = 0
    close_calls: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, request: Request) -> None:
        """A request that has ended."""
        usage = request.usage
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.preemptions += usage.preemptions
        self.close_calls += usage.close_calls
        self.ended[str(request.ended)] = self.ended.get(str(request.ended), 0) + 1


def output_of(request: Request) -> Output:
    """A request as its answer."""
    wish = request.sampling
    return Output(
        request.prompt_index,
        request.choice,
        request.ids[: request.prompt_len],
        request.answer,
        None if request.spoken is None else request.spoken.shown,
        None if wish.logprobs is None else request.logprobs,
        None if wish.prompt_logprobs is None else request.prompt_logprobs,
        str(request.ended),
        request.stopped_by,
        request.usage,
    )
