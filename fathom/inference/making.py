"""How prompts and wishes become requests: everything that can be wrong with them is found here, at once."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from fathom.data import Tokenizer
from fathom.errors import GenerationError
from fathom.inference.guided import Grammars, Guided
from fathom.inference.prompts import Prompt, check_length, ids_of
from fathom.inference.request import Request
from fathom.inference.sampling import Sampling
from fathom.inference.stopping import Spoken
from fathom.model import ModelConfig


def wishes_for(
    prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None
) -> list[Sampling]:
    """One for each prompt."""
    if isinstance(prompts, str):
        raise GenerationError("prompts is one text; give a list of prompts: [text]")
    if sampling is None or isinstance(sampling, Sampling):
        return [sampling or Sampling()] * len(prompts)
    if len(sampling) != len(prompts):
        raise GenerationError(
            f"{len(prompts)} prompts and {len(sampling)} samplings do not pair; give one for all or one for each"
        )
    return list(sampling)


class RequestMaker:
    """Makes the requests of one engine, whose cache has room for `room` tokens."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None, room: int) -> None:
        self.config, self.tokenizer, self.room = config, tokenizer, room
        end = config.eos_token_id if tokenizer is None else tokenizer.eos_id
        self._ends = frozenset({end})
        self._grammars: Grammars | None = None
        self._number = 0

    def make(self, prompt: Prompt, wish: Sampling, index: int) -> list[Request]:
        """The `n` requests of a prompt; all but the first wait until that has read it."""
        ids = ids_of(prompt, self.tokenizer, self.config.vocab_size)
        limit = self._limit(len(ids), wish)
        self._check_bias(wish)
        seed = secrets.randbits(63) if wish.seed is None else wish.seed
        ends = frozenset(wish.stop_token_ids) | (frozenset() if wish.ignore_eos else self._ends)
        if wish.stop and self.tokenizer is None:
            raise GenerationError(f"stop={wish.stop} needs a tokenizer; use stop_token_ids")
        requests: list[Request] = []
        for choice, guided in enumerate(self._guided(ids, wish, ends)):
            spoken = None if self.tokenizer is None else Spoken(self.tokenizer.stream(), wish.stop)
            request = Request(self._number, ids, wish, seed + choice, limit, ends, spoken, guided)
            request.prompt_index, request.choice = index, choice
            request.waits_for = requests[0] if requests else None
            requests.append(request)
            self._number += 1
        return requests

    def _guided(
        self, ids: list[int], wish: Sampling, ends: frozenset[int]
    ) -> Sequence[Guided | None]:
        """The states of `n` answers in a form; what that needs of the tokenizer is made for the first."""
        if wish.guide is None:
            return [None] * wish.n
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self.config.vocab_size)
        return self._grammars.begin(wish.guide, ids, ends, wish.n)

    def _limit(self, prompt: int, wish: Sampling) -> int:
        """Tokens of the longest text that prompt and answer may be together; checked against all that bounds it."""
        context, new = self.config.max_position_embeddings, wish.max_new_tokens
        check_length(prompt, new, context)
        limit = context if new is None else prompt + new
        room = self.room
        if limit > room and new is not None:
            raise GenerationError(
                f"{prompt} tokens and max_new_tokens={new} do not fit the cache of {room} tokens; "
                f"raise max_memory or ask for fewer"
            )
        if prompt >= room:
            raise GenerationError(
                f"a prompt of {prompt} tokens does not fit the cache of {room} tokens; raise max_memory or shorten it"
            )
        return min(limit, room)

    def _check_bias(self, wish: Sampling) -> None:
        wrong = next((token for token in wish.logit_bias if token >= self.config.vocab_size), None)
        if wrong is not None:
            raise GenerationError(
                f"logit_bias names token {wrong}, outside the model's vocabulary of "
                f"{self.config.vocab_size}; leave it out"
            )

    def room_behind(self, prompt: Prompt) -> int:
        """How many tokens an answer to the prompt may have, by the model's context and the cache."""
        held = len(ids_of(prompt, self.tokenizer, self.config.vocab_size))
        return max(min(self.config.max_position_embeddings, self.room) - held, 0)
