"""Models that need no training: they look a key up in the last `sight` tokens, as a perfect reader would."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fathom.data import Tokenizer, needles
from fathom.model import ModelConfig

SYLLABLES = [
    needles.syllable(key, value) for key in needles.KEYS for value in range(needles.VALUES)
]
SHAPE = {"num_hidden_layers": 1, "kv_lora_rank": 2, "qk_rope_head_dim": 2}


def characters() -> Tokenizer:
    """A character tokenizer that knows the whole source."""
    return Tokenizer.train([needles.alphabet()], None, "char")


class Reader(nn.Module):
    """Answers a key with the last syllable of it that is in sight, and with its first one where there is none."""

    def __init__(self, tokenizer: Tokenizer, sight: int, limit: int = 4096) -> None:
        super().__init__()
        self.sight = sight
        ids = tokenizer.encode("".join(SYLLABLES))
        self.of_key = {
            key_id: ids[i * needles.VALUES : (i + 1) * needles.VALUES]
            for i, key_id in enumerate(tokenizer.encode("".join(needles.KEYS)))
        }
        size = tokenizer.vocab_size
        self.config = ModelConfig(vocab_size=size, max_position_embeddings=limit, **SHAPE)
        self.lm_head = nn.Linear(size, size, bias=False)
        self.lm_head.weight.data.copy_(torch.eye(size))
        self.compute_dtype = None
        self.read: list[tuple[int, int]] = []

    def trunk(self, tokens: Tensor, cache: Any, mtp: bool) -> SimpleNamespace:
        assert not self.training and not mtp
        self.read.append((tokens.shape[0], tokens.shape[1]))
        said = torch.tensor([self._next(row) for row in tokens.tolist()])
        one_hot = nn.functional.one_hot(said, self.config.vocab_size).float()
        cache.advance(tokens.shape[1])
        return SimpleNamespace(hidden=one_hot[:, None])

    def _next(self, ids: list[int]) -> int:
        candidates = self.of_key[ids[-1]]
        seen = [token for token in ids[-self.sight :] if token in candidates]
        return seen[-1] if seen else candidates[0]
