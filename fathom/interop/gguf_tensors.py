"""A model's tensors as llama.cpp names and arranges them, one after the other.

    ours                                    GGUF (axes as numpy has them; the file lists them from the last)
    kv_b_proj [H (P + V), C]                attn_k_b [H, C, P] and attn_v_b [H, V, C]: attention is absorbed
    experts.gate_up_proj [E, 2I, D]         ffn_gate_exps [E, I, D] and ffn_up_exps [E, I, D]
    experts.down_proj [E, D, I]             ffn_down_exps [E, D, I]
    gate.e_score_correction_bias [E]        exp_probs_b.bias [E]

All others keep their shape. Two differences between the programs are made up for in the weights:

* llama.cpp turns adjacent pairs of the rotary dimensions. Where ours are (j, j + R/2), the rows that make them are put
  in that order, in queries and key alike, which leaves their products as they are.
* It has one epsilon for all norms; ours of the latents is always 1e-6. RMSNorm(c x) with epsilon e is RMSNorm(x) with
  epsilon e / c^2, so the rows that make a latent are multiplied by c = sqrt(e / 1e-6).

Letters: H heads, P and R dimensions without and with rotation, V of a value, C latent rank, E experts, I their width,
D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from fathom.model.attention import Attention
from fathom.model.block import Block
from fathom.model.config import ModelConfig
from fathom.model.layers import LATENT_EPS, MLP
from fathom.model.moe import MoE
from fathom.model.mtp import MTPModule
from fathom.model.transformer import Transformer

Named = Iterator[tuple[str, Tensor]]
ROUTER = "ffn_gate_inp.weight"


def tensors(model: Transformer, mtp: bool = False) -> Named:
    """Every tensor of the file in order, views wherever they can be; `mtp`: the first MTP module as a last block."""
    decoder = model.model
    yield "token_embd.weight", decoder.embed_tokens.weight
    for number, layer in enumerate((*decoder.layers, *(decoder.mtp[:1] if mtp else ()))):
        for name, tensor in _block(cast(Block, layer), model.config):
            yield f"blk.{number}.{name}", tensor
    yield "output_norm.weight", decoder.norm.weight
    if not model.config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight


def _block(block: Block, config: ModelConfig) -> Named:
    yield "attn_norm.weight", block.input_layernorm.weight
    yield from _queries(block.self_attn, config)
    yield from _keys_and_values(block.self_attn, config)
    yield "attn_output.weight", block.self_attn.o_proj.weight
    yield "ffn_norm.weight", block.post_attention_layernorm.weight
    if isinstance(block.mlp, MoE):
        yield from _experts(block.mlp)
    else:
        yield from _feed_forward(block.mlp, "")
    if isinstance(block, MTPModule):
        yield "nextn.eh_proj.weight", block.eh_proj.weight
        yield "nextn.enorm.weight", block.enorm.weight
        yield "nextn.hnorm.weight", block.hnorm.weight
        yield "nextn.shared_head_norm.weight", block.shared_head.norm.weight


def _queries(attention: Attention, config: ModelConfig) -> Named:
    if config.q_lora_rank is None:
        yield "attn_q.weight", _paired_queries(attention.q_proj.weight, config)
        return
    yield "attn_q_a.weight", _of_latent(attention.q_a_proj.weight, config)
    yield "attn_q_a_norm.weight", attention.q_a_layernorm.weight
    yield "attn_q_b.weight", _paired_queries(attention.q_b_proj.weight, config)


def _keys_and_values(attention: Attention, config: ModelConfig) -> Named:
    C, P = config.kv_lora_rank, config.qk_nope_head_dim
    latent, rope = attention.kv_a_proj_with_mqa.weight.split((C, config.qk_rope_head_dim))
    rows = (_of_latent(latent, config), _paired(rope, config))
    yield "attn_kv_a_mqa.weight", torch.cat(rows)
    yield "attn_kv_a_norm.weight", attention.kv_a_layernorm.weight
    up_HXC = attention.up_by_head(attention.kv_b_proj.weight.dtype)
    yield "attn_k_b.weight", up_HXC[:, :P].transpose(1, 2)
    yield "attn_v_b.weight", up_HXC[:, P:]


def _experts(moe: MoE) -> Named:
    yield ROUTER, moe.gate.weight
    if moe.gate.e_score_correction_bias is not None:
        yield "exp_probs_b.bias", moe.gate.e_score_correction_bias
    gate_EID, up_EID = moe.experts.gate_up_proj.chunk(2, dim=1)
    yield "ffn_gate_exps.weight", gate_EID
    yield "ffn_up_exps.weight", up_EID
    yield "ffn_down_exps.weight", moe.experts.down_proj
    yield from _feed_forward(moe.shared_experts, "_shexp")


def _feed_forward(mlp: MLP, kind: str) -> Named:
    yield f"ffn_gate{kind}.weight", mlp.gate_proj.weight
    yield f"ffn_up{kind}.weight", mlp.up_proj.weight
    yield f"ffn_down{kind}.weight", mlp.down_proj.weight


def _of_latent(rows: Tensor, config: ModelConfig) -> Tensor:
    """The rows that make a latent, times c of the header (1 at the released epsilon)."""
    if config.rms_norm_eps == LATENT_EPS:
        return rows
    return rows.float() * math.sqrt(config.rms_norm_eps / LATENT_EPS)


def _paired_queries(weight: Tensor, config: ModelConfig) -> Tensor:
    """The rotated rows of every head [H (P + R), X] in adjacent pairs."""
    if config.rope_interleave:
        return weight
    by_head = weight.unflatten(0, (config.num_attention_heads, -1))
    nope, rope = by_head.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=1)
    return torch.cat((nope, _paired(rope, config)), dim=1).flatten(0, 1)


def _paired(rows: Tensor, config: ModelConfig) -> Tensor:
    """Rotated rows [..., R, X] in adjacent pairs: row j + R/2 behind row j."""
    if config.rope_interleave:
        return rows
    return rows.unflatten(-2, (2, -1)).transpose(-3, -2).flatten(-3, -2)
