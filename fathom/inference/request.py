"""One answer that is being made: its tokens, its blocks, how far it was read, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from fathom.inference.choice import CLOSE, Draw, Logprob
from fathom.inference.guided import Guided
from fathom.inference.sampling import Sampling
from fathom.inference.stopping import Spoken


class Ended(StrEnum):
    """Why an answer ended, as OpenAI's interface says it."""

    STOP = "stop"
    """The model's end-of-sentence, a stop token, a stop text, or the end of the guide's form."""
    LENGTH = "length"
    """max_new_tokens, or the end of the model's context."""
    ABORT = "abort"
    """The one who asked went away."""
    ERROR = "error"
    """The guide's form cannot be kept, or the model's logits are no numbers; `stopped_by` says which."""


@dataclass
class Usage:
    """What an answer took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose latents an earlier text had left in the cache."""
    forwards: int = 0
    """Passes of the model that gave at least one of its tokens."""
    drafted: list[int] = field(default_factory=list)
    """Drafts by their place behind the last certain token."""
    accepted: list[int] = field(default_factory=list)
    """Those of them that the model chose too."""
    preemptions: int = 0
    """How often its blocks were taken away and it had to be read again."""
    close_calls: int = 0
    """Tokens chosen by a gap below `choice.CLOSE`, which another way of computing may choose otherwise."""


def count_places(counts: list[int], number: int) -> None:
    """One more at each of the first `number` places."""
    counts.extend([0] * (number - len(counts)))
    for place in range(number):
        counts[place] += 1


class Request:
    """One answer. `ids` is prompt and answer; latents of the first `computed` of them are in its blocks."""

    def __init__(
        self,
        number: int,
        prompt_ids: list[int],
        sampling: Sampling,
        seed: int,
        limit: int,
        ends: frozenset[int],
        spoken: Spoken | None = None,
        guided: Guided | None = None,
    ) -> None:
        """`limit`: tokens of the longest text it may become; `ends`: tokens that end it."""
        self.number, self.sampling, self.seed = number, sampling, seed
        self.limit, self.ends, self.spoken, self.guided = limit, ends, spoken, guided
        self.ids, self.prompt_len = list(prompt_ids), len(prompt_ids)
        self.prompt_index, self.choice = 0, 0
        self.computed, self.published = 0, 0
        self.blocks: list[int] = []
        self.digests: list[bytes] = []
        self.drafts: list[int] = []
        self.ended: Ended | None = None
        self.stopped_by: int | str | None = None
        self.logprobs: list[Logprob] = []
        self.prompt_logprobs: list[Logprob | None] = [None]
        self.usage = Usage(prompt_tokens=len(prompt_ids))
        self.waits_for: Request | None = None

    @property
    def answer(self) -> list[int]:
        return self.ids[self.prompt_len :]

    @property
    def unread(self) -> int:
        """Tokens the model has not read yet, drafts not counted; 1 while decoding."""
        return len(self.ids) - self.computed

    @property
    def decoding(self) -> bool:
        """Whether all but its last token were read and that one is the answer's."""
        return self.unread == 1 and len(self.ids) > self.prompt_len

    @property
    def known(self) -> list[int]:
        """Tokens and drafts behind them."""
        return self.ids + self.drafts

    def draw(self, drafts: int) -> Draw:
        """What the choice depends on if the first `drafts` drafts are right."""
        said = len(self.ids) - self.prompt_len
        allowed_V = None if self.guided is None else self.guided.allowed(self.drafts[:drafts])
        if not self.sampling.penalised:
            return Draw(self.sampling, self.seed, said + drafts, allowed_V=allowed_V)
        answer = self.answer + self.drafts[:drafts]
        prompt = self.ids[: self.prompt_len]
        return Draw(self.sampling, self.seed, said + drafts, prompt, answer, allowed_V)

    def append(self, token: int, gap: float) -> str:
        """The next token of the answer; the text that it makes certain. Sets `ended` if it is the last."""
        self.ids.append(token)
        self.usage.close_calls += gap < CLOSE
        self.usage.completion_tokens += 1
        text = ""
        if token in self.ends:
            self.ended, self.stopped_by = Ended.STOP, token
        elif self.spoken is not None:
            text = self.spoken.push(token)
            if self.spoken.stopped_by is not None:
                self.ended, self.stopped_by = Ended.STOP, self.spoken.stopped_by
        if self.ended is None and self.guided is not None:
            self._follow_guide(self.guided, token)
        if self.ended is None and len(self.ids) >= self.limit:
            self.ended = Ended.LENGTH
        if self.ended is not None and self.spoken is not None:
            text += self.spoken.end()
        return text

    def _follow_guide(self, guided: Guided, token: int) -> None:
        guided.advance(token)
        if guided.failure is not None:
            self.ended, self.stopped_by = Ended.ERROR, guided.failure
        elif guided.complete:
            self.ended = Ended.STOP

    def put_back(self) -> None:
        """Its blocks were taken: everything must be read again."""
        self.blocks, self.computed, self.published, self.drafts = [], 0, 0, []
        self.usage.preemptions += 1
