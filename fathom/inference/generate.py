"""One text on one cache, token by token (report §2.1.1): what the engine must agree with, in a few lines.

prompt ids --expanded prefill--> latents in the cache --absorbed, token by token--> new ids
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch

from fathom.errors import GenerationError
from fathom.inference.choice import Draw, choose
from fathom.inference.prompts import check_length, ids_of
from fathom.inference.sampling import Sampling
from fathom.model import LatentCache, Transformer


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
) -> list[int]:
    """The continuation of `prompt_ids`; a token of `stop_ids` ends it and is left out. Sampling None is greedy.

    Of `sampling` this takes what concerns the choice of tokens. The model may be in the middle of its training.
    Raises `GenerationError` when there is nothing to continue, when it does not fit the model's context, or for
    unknown ids, and for a guide.
    """
    wish = sampling or Sampling(temperature=0.0)
    if wish.guide is not None:
        raise GenerationError("a guide needs a tokenizer beside the model; ask a fathom.Engine")
    ids = ids_of(prompt_ids, None, model.config.vocab_size)
    check_length(len(ids), max_new_tokens, model.config.max_position_embeddings)
    seed = secrets.randbits(63) if wish.seed is None else wish.seed
    answer: list[int] = []
    with evaluating(model), torch.inference_mode():
        for logits_1V in _logits(model, ids, answer, max_new_tokens):
            draw = Draw(wish, seed, len(answer), ids, tuple(answer))
            answer.append(choose(logits_1V, [draw]).tokens[0])
            if answer[-1] in stop_ids:
                return answer[:-1]
    return answer


def _logits(
    model: Transformer, ids: list[int], answer: list[int], count: int
) -> Iterator[torch.Tensor]:
    """Logits [1, V] behind the prompt and behind each token that is added to `answer`, `count` in all."""
    weight = model.lm_head.weight
    dtype = model.compute_dtype or weight.dtype
    cache = LatentCache(model.config, 1, len(ids) + count, dtype, weight.device)
    for _ in range(count):
        unread = [*ids, *answer][cache.length :]
        hidden = model.trunk(
            torch.tensor([unread], device=weight.device), cache=cache, mtp=False
        ).hidden
        yield model.lm_head(hidden[:, -1])


@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Within: nothing that is read counts towards the experts' load."""
    if not model.training:  # asking every module anew would take a millisecond at each step
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
