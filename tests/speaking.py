"""A small random model and a tokenizer to serve, export and talk to, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken

import fathom
from fathom.data import Tokenizer
from fathom.data.chat import CHAT_TEMPLATE
from fathom.data.vocabulary import BOS, EOS, PAD, train_bpe

GREETINGS = "def greet(name):\n    return f'Hello, {name}!'\n" * 30
TOOL_TOKENS = [
    f"<｜tool▁{what}｜>"
    for what in (
        *(f"{p}▁{e}" for p in ("calls", "call", "outputs", "output") for e in ("begin", "end")),
        "sep",
    )
]
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "initializer_range": 0.2,
}
"""Wide enough to say different things to different prompts."""


def small_config(vocab_size: int, **changes: Any) -> fathom.ModelConfig:
    """The shape with some fields changed."""
    return fathom.ModelConfig(vocab_size=vocab_size, **{**SHAPE, **changes})


def small_model(vocab_size: int, **changes: Any) -> fathom.Transformer:
    """Random weights, the same every time."""
    torch.manual_seed(0)
    return fathom.Transformer(small_config(vocab_size, **changes))


def talking_tokenizer(
    texts: Sequence[str] = (GREETINGS,), size: int = 500, tools: bool = True, think: bool = False
) -> Tokenizer:
    """`size` ids of bytes and some merges, the control tokens of conversations, then those that are asked for."""
    backend = train_bpe(texts, size)
    more = (TOOL_TOKENS if tools else []) + (["<think>", "</think>"] if think else [])
    backend.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in more])
    settings = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    return Tokenizer(backend.to_str(), {**settings, "chat_template": CHAT_TEMPLATE})
