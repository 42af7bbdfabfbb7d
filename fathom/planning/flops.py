"""Floating-point operations per trained token: what the model needs, whatever an implementation spends.

A product of a token with a matrix of n parameters is 2n operations (a multiplication and an addition each), and its
backward pass is two more such products: 6n per trained token, over the matrices that a token goes through. Attention
adds the products of queries with keys and of weights with values, over half the sequence on average because it
is causal. Norms, rotations, softmax and the embedding's look-up are left out, and so is anything computed twice to save
memory, as usual for model FLOPs utilisation (MFU).
"""

from __future__ import annotations

from fathom.model import ModelConfig
from fathom.planning.parameters import attention_matrices, feed_forward, inactive_experts


def flops_per_token(config: ModelConfig, seq_len: int, mtp: bool = True) -> float:
    """Forward and backward operations per trained token at sequences of `seq_len` tokens."""
    return 3 * forward_flops_per_token(config, seq_len, mtp)


def forward_flops_per_token(config: ModelConfig, seq_len: int, mtp: bool = True) -> float:
    """Forward operations per token. MTP module k runs on the `seq_len` - k positions that it has (eq 22)."""
    layers = range(config.num_hidden_layers)
    head = head_flops(config)
    total: float = head + sum(block_flops(config, layer, seq_len) for layer in layers)
    for k in range(config.num_nextn_predict_layers if mtp else 0):
        positions = max(0, seq_len - k - 1)
        block = block_flops(config, config.num_hidden_layers + k, positions)
        total += (join_flops(config) + block + head) * positions / seq_len
    return total


def block_flops(config: ModelConfig, layer: int, seq_len: int) -> float:
    """Forward operations per token in one block: matrices, then attention."""
    active = feed_forward(config, layer) - inactive_experts(config, layer)
    return 2 * (attention_matrices(config) + active) + core_flops(config, seq_len)


def core_flops(config: ModelConfig, seq_len: int) -> float:
    """Forward operations per token in attention itself: a query sees (seq_len + 1) / 2 keys on average."""
    per_key = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 2 * per_key * (seq_len + 1) / 2


def head_flops(config: ModelConfig) -> int:
    """Forward operations per token in the output head."""
    return 2 * config.vocab_size * config.hidden_size


def join_flops(config: ModelConfig) -> int:
    """Forward operations per token in an MTP module's eh_proj (eq 21)."""
    return 2 * 2 * config.hidden_size**2
