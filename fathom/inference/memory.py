"""How much of the memory a user grants is for the cache, and sizes as people write them."""

from __future__ import annotations

import re

import torch

from fathom.errors import GenerationError
from fathom.inference.pages import EXPANDED, Pages
from fathom.kernels.paged_attention import SCORES
from fathom.model import ModelConfig

_UNITS = {"": 1, "B": 1} | {
    name: base**power
    for power, letter in enumerate("KMGT", start=1)
    for name, base in ((f"{letter}B", 1000), (f"{letter}IB", 1024), (letter, 1024))
}


def bytes_of(size: int | str) -> int:
    """1500000, "512MiB", "1.5GB" -> bytes; `GenerationError` for what is not a size."""
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(size))
    unit = _UNITS.get(found[2].upper()) if found else None
    try:
        if found and unit:
            return int(float(found[1]) * unit)
    except ValueError:
        pass
    raise GenerationError(
        f"max_memory={size!r} is not a size; write for example '4GiB' or '512MiB'"
    )


def bytes_of_a_pass(config: ModelConfig, tokens: int, dtype: torch.dtype, rows: int) -> int:
    """What a pass over `tokens` tokens with logits of `rows` rows takes at its widest (an estimate from above)."""
    D, V = config.hidden_size, config.vocab_size
    heads = config.num_attention_heads * (2 * config.qk_head_dim + 2 * config.v_head_dim)
    experts = config.num_experts_per_tok * (3 * config.moe_intermediate_size + 2 * D)
    wide = max(3 * config.intermediate_size, experts)
    latent = config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    activations = tokens * (6 * D + heads + latent + wide) * dtype.itemsize
    longest = config.max_position_embeddings
    each = 2 * (config.qk_head_dim + config.v_head_dim) * config.num_attention_heads
    expanded = min(EXPANDED, longest * each) * dtype.itemsize
    scores = 3 * 4 * min(SCORES, tokens * config.num_attention_heads * longest)
    logits = 4 * rows * V * 8
    return activations + expanded + scores + logits


def blocks_for(
    config: ModelConfig,
    memory: int,
    size: int,
    tokens: int,
    requests: int,
    drafts: int,
    dtype: torch.dtype,
) -> int:
    """How many blocks the memory has room for beside the work of a pass; no more than could ever be used."""
    if min(size, tokens, requests) < 1:
        raise GenerationError(
            f"block_size={size}, batch_tokens={tokens} and max_requests={requests} must be at least 1"
        )
    rows = requests * (1 + drafts)
    work = bytes_of_a_pass(config, tokens + rows, dtype, rows)
    block = Pages.bytes_per_token(config, dtype) * size
    most = requests * -(-config.max_position_embeddings // size)
    count, least = min((memory - work) // block, most), min(most, 2)
    if count < least:
        raise GenerationError(
            f"max_memory of {memory:,} bytes is too little: a pass takes {work:,} and a block of the cache "
            f"{block:,}; give at least {work + least * block:,}, or fewer batch_tokens or max_requests"
        )
    return count
