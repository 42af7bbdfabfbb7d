"""One text at a time on the latent cache (report §2.1.1): expanded prefill, absorbed decoding.

    prompt ids --prefill--> latents in the cache --token by token, against the latents--> new ids

Batching, paging and speculation belong to an engine; this is what it must agree with.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from fathom.errors import GenerationError
from fathom.inference.choice import Draw, choose
from fathom.inference.sampling import Sampling
from fathom.inference.step import Step
from fathom.model import LatentCache, Transformer

_FIRST_ROOM = 256


class Session:
    """A text that grows, and the cache of what the model has read of it; new tokens alone are computed.

    `ids` is the whole text; the cache holds its first tokens, as many as were read, so that an interruption at any
    point leaves both in agreement.
    """

    def __init__(self, model: Transformer, step: Step | None = None) -> None:
        """`step`, made from the same model, reads single tokens where there is one."""
        self.model, self.step = model, step
        self.ids: list[int] = []
        self._cache = self._make_cache(_FIRST_ROOM)

    @property
    def room(self) -> int:
        """Tokens that still fit into the model's context."""
        return self.model.config.max_position_embeddings - len(self.ids)

    def stream(
        self,
        new_ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
    ) -> Iterator[int]:
        """Append `new_ids` to the text and yield what the model says next, at most `max_new_tokens`.

        A token of `stop_ids` ends it; that token joins the text but is not yielded. Raises `GenerationError` at once
        when there is nothing to continue, when it does not fit the model's context, or for unknown ids.
        """
        if sampling.guide is not None:
            raise GenerationError("a session knows no guides; ask a fathom.Engine")
        self._check(new_ids, max_new_tokens)
        self.ids += new_ids
        return self._stream(max_new_tokens, sampling, frozenset(stop_ids))

    def _stream(self, count: int, sampling: Sampling, stop_ids: frozenset[int]) -> Iterator[int]:
        begin = len(self.ids)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        for place in range(count):
            draw = Draw(sampling, seed, place, self.ids[:begin], self.ids[begin:])
            token = choose(self._read(), [draw]).tokens[0]
            self.ids.append(token)
            if token in stop_ids:
                return
            yield token

    def _check(self, new_ids: Sequence[int], max_new_tokens: int) -> None:
        config = self.model.config
        limit, before = config.max_position_embeddings, len(self.ids) + len(new_ids)
        if max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if not before:
            raise GenerationError("the prompt is empty; give at least one token to continue")
        if before >= limit:
            raise GenerationError(
                f"a prompt of {before} tokens fills the model's context of {limit}; shorten it"
            )
        if before + max_new_tokens > limit:
            raise GenerationError(
                f"{before} tokens and max_new_tokens={max_new_tokens} exceed the model's context of {limit}; "
                f"ask for at most {limit - before} new tokens or shorten the prompt"
            )
        wrong = [token for token in new_ids if not 0 <= token < config.vocab_size]
        if wrong:
            raise GenerationError(
                f"token id {wrong[0]} is outside the model's vocabulary of {config.vocab_size}; "
                f"use the tokenizer that the model was trained with"
            )

    @torch.no_grad()
    def _read(self) -> Tensor:
        """Read what the cache does not hold yet; logits [1, V] behind the last token."""
        self._make_room(len(self.ids))
        unread = self.ids[self._cache.length :]
        if self.step is not None and len(unread) == 1:
            return self.step(unread[0], self._cache)
        tokens = torch.tensor([unread], device=self.model.lm_head.weight.device)
        training = self.model.training
        if training:  # a sample in the middle of training must not count towards the experts' load
            self.model.eval()
        try:
            hidden = self.model.trunk(tokens, cache=self._cache, mtp=False).hidden
            return self.model.lm_head(hidden[:, -1])
        finally:
            if training:
                self.model.train()

    def _make_room(self, needed: int) -> None:
        """Let the cache grow with the text, by doubling: a long context costs memory only once it is used."""
        if needed <= self._cache.max_len:
            return
        held, old = self._cache.length, self._cache
        self._cache = self._make_cache(max(needed, 2 * old.max_len))
        for new_BSX, old_BSX in zip(self._cache.tensors, old.tensors, strict=True):
            new_BSX[:, :held] = old_BSX[:, :held]
        self._cache.advance(held)

    def _make_cache(self, room: int) -> LatentCache:
        weight, config = self.model.lm_head.weight, self.model.config
        dtype = self.model.compute_dtype or weight.dtype
        room = min(room, config.max_position_embeddings)
        return LatentCache(config, 1, room, dtype, weight.device)


def stream(
    model: Transformer,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Yield the model's continuation of `prompt_ids`; see `Session.stream`. Sampling None is greedy."""
    sampling = sampling or Sampling(temperature=0.0)
    return Session(model).stream(prompt_ids, max_new_tokens, sampling, stop_ids)


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
) -> list[int]:
    """The whole continuation at once; see `stream`."""
    return list(stream(model, prompt_ids, max_new_tokens, sampling, stop_ids))
