"""One token of one text through the whole model in as few calls as possible (report §2.1.1, §3.4).

`Transformer` with a cache does the same for any number of texts and tokens; it is the reference
that this must equal. With a single token the time goes into calls: over a hundred a layer, of some
microseconds each, beside products that read each weight once. Here a layer is two functions around
the attention over the cache:

    project   RMSNorm, both latents, rotation, W_UK absorbed into the query   -> query, cache entry
    attend    softmax(query . cache) cache                                    -> latent per head
    finish    W_UV, W_O, residual, RMSNorm, feed-forward or experts, residual -> next hidden state

By default they run as torch's operations on weights that stand by columns (`kernels.decoding`).
Compiled, each becomes one fused loop nest over weights as they are, which all layers share: faster
again, for some ten seconds of compiling (two once the compiler's cache on the disk is warm). One
graph of all layers would compile for as long as there are layers.

Shapes: D hidden, H heads, P nope, R rotary, V value dims, C latent rank, X = C + R, S cached tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fathom.kernels import few_rows
from fathom.kernels.decoding import (
    absorb_query,
    by_columns,
    expand_values,
    expert_products,
    row_product,
    summed_expert_products,
)
from fathom.kernels.grouped import grouped_linear
from fathom.kernels.linear import linear
from fathom.kernels.native import library
from fathom.kernels.paged_attention import latent_attention
from fathom.kernels.rotary import Rotation, rotate
from fathom.kernels.swiglu import swiglu, swiglu_pair
from fathom.model import LatentCache, Transformer
from fathom.model.attention import Attention
from fathom.model.block import Block
from fathom.model.layers import MLP, Linear
from fathom.model.moe import Experts, MoE
from fathom.model.router import affinities, choose

_CPU = torch.device("cpu")


class TextCache(Protocol):
    """The cache of one text: `LatentCache` of batch 1, or the engine's pages."""

    length: int

    def append(self, layer: int, entries_BTX: Tensor) -> Tensor:
        """Write the entry [1, 1, X] of the next token; all of the layer's [1, S, X]."""

    def advance(self, tokens: int) -> None:
        """Count tokens that all layers have written."""


def project(block: Block, h_1D: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Scaled absorbed query [H, X] and cache entry [1, X] of one token (eqs 1, 3, 6-9)."""
    layer = block.self_attn
    shape, rank = layer.shape, layer.config.kv_lora_rank
    x_1D = block.input_layernorm(h_1D)
    q_HQ = _queries(layer, x_1D).view(shape.heads, shape.qk)
    latent, k_rope = times(layer.kv_a_proj_with_mqa, x_1D).split((rank, shape.rope), -1)
    turning = torch.cat((q_HQ[:, shape.nope :], k_rope))[None, None]
    turned = rotate(turning, rotation)[0, 0]
    absorbed = absorb_query(q_HQ[:, : shape.nope], _up(layer))
    query = torch.cat((absorbed, turned[: shape.heads]), -1) * layer.scale
    return query, torch.cat((layer.kv_a_layernorm(latent), turned[shape.heads :]), -1)


def times(linear: Linear, x_1I: Tensor) -> Tensor:
    """One row through a layer's weights, however they are stored."""
    if linear.scales is not None:
        return few_rows.product(x_1I, linear.weight, linear.scales)
    return row_product(x_1I, linear.weight)


def _queries(layer: Attention, x_1D: Tensor) -> Tensor:
    if layer.config.q_lora_rank is None:
        return times(layer.q_proj, x_1D)
    latent = layer.q_a_layernorm(times(layer.q_a_proj, x_1D))
    return times(layer.q_b_proj, latent)


def _up(layer: Attention) -> Tensor:
    """W_UK and W_UV by head, [H, P+V, C]."""
    return layer.kv_b_proj.weight.view(layer.shape.heads, layer.shape.nope + layer.shape.value, -1)


def attend(query_HX: Tensor, cache_SX: Tensor, text: few_rows.Texts | None = None) -> Tensor:
    """Weighted mean of the cache for each head, [H, X] (eq 10 in the latent space).

    `text`: the cache as one run, made once for all layers.
    """
    if text is not None and few_rows.can_attend(query_HX, cache_SX):
        return few_rows.attend(query_HX[None], cache_SX, text)[0]
    return latent_attention(query_HX[None], [cache_SX])[0]


def finish(block: Block, h_1D: Tensor, attended_HX: Tensor) -> Tensor:
    """The residual stream behind the layer, [1, D] (eqs 5, 11, 12)."""
    layer = block.self_attn
    latent = attended_HX[:, : layer.config.kv_lora_rank]
    values = expand_values(latent, _up(layer), layer.shape.nope)
    h_1D = h_1D + times(layer.o_proj, values.view(1, -1))
    x_1D = block.post_attention_layernorm(h_1D)
    return h_1D + (
        _mixture(block.mlp, x_1D) if isinstance(block.mlp, MoE) else _mlp(block.mlp, x_1D)
    )


def _mlp(mlp: MLP, x_1D: Tensor) -> Tensor:
    gate, up = times(mlp.gate_proj, x_1D), times(mlp.up_proj, x_1D)
    hidden = swiglu_pair(gate, up)
    return times(mlp.down_proj, hidden)


def _mixture(moe: MoE, x_1D: Tensor) -> Tensor:
    logits, bias = row_product(x_1D, moe.gate.weight), moe.gate.e_score_correction_bias
    indices, weights = choose(affinities(logits, moe.config), bias, moe.config)
    experts = moe.experts
    if few_rows.can(x_1D, experts.down_proj):
        routed = few_rows.experts(
            x_1D, experts.gate_up_proj, experts.down_proj, indices, weights, experts.scales
        )
    else:
        hidden = swiglu(expert_products(x_1D, experts.gate_up_proj, indices[0]))
        hidden = hidden * weights[0, :, None]
        routed = summed_expert_products(hidden, experts.down_proj, indices[0])
    return routed + _mlp(moe.shared_experts, x_1D) if moe.config.n_shared_experts else routed


def head(model: Transformer, h_1D: Tensor) -> Tensor:
    """Logits [1, V]."""
    return times(model.lm_head, model.model.norm(h_1D))


class Step:
    """Reads one token of one text at a time; for models that `suits`."""

    def __init__(self, model: Transformer, compiled: bool = False) -> None:
        """Lays the weights out by columns, in place; with `compiled` leaves them and compiles.

        Where no compiler works the plain form is used, and the reason is warned.
        """
        self.model = model.requires_grad_(False)
        if compiled and self._compile():
            return
        self.parts = PARTS
        if library() is None:
            lay_out_by_columns(model)

    def _compile(self) -> bool:
        self.parts = tuple(map(_compiled, PARTS))
        try:
            self(0, LatentCache(self.model.config, 1, 1))
        except Exception as problem:  # a compiler has many ways to fail
            warnings.warn(f"torch.compile failed, going on without it: {problem}", stacklevel=3)
            return False
        return True

    @staticmethod
    def suits(model: Transformer) -> bool:
        """Whether it is a model on a CPU that computes in float32 and whose products nobody has replaced.

        Weights may be stored in fewer bits where our C++ is there to read them.
        """
        products = [m for m in model.modules() if isinstance(m, Linear | Experts)]
        plain = all(m.matmul in (linear, grouped_linear) or m.scales is not None for m in products)
        wide = all(m.compute_dtype in (None, torch.float32) for m in products)
        weight, embedding = model.lm_head.weight, model.model.embed_tokens.weight
        ready = weight.dtype == torch.float32 or library() is not None
        on_cpu = embedding.device.type == "cpu" and embedding.dtype == torch.float32
        return plain and wide and ready and on_cpu

    @torch.inference_mode()
    def __call__(self, token: int, cache: TextCache) -> Tensor:
        """Append the token to the cache of one text; logits [1, V]."""
        return self.logits(self.hidden(token, cache))

    def logits(self, h_1D: Tensor) -> Tensor:
        """[1, V] of what `hidden` gives."""
        return self.parts[2](self.model, h_1D)

    @torch.inference_mode()
    def hidden(self, token: int, cache: TextCache) -> Tensor:
        """The same up to the final norm, [1, D]."""
        project, finish, _ = self.parts
        decoder = self.model.model
        rotation, text = self._rotation(cache.length), few_rows.one_text(cache.length + 1)
        h_1D = decoder.embed_tokens(torch.tensor([token]))
        for number, block in enumerate(decoder.layers):
            query, entry = project(block, h_1D, rotation)
            held = cache.append(number, entry[None])[0]
            h_1D = finish(block, h_1D, attend(query, held, text))
        cache.advance(1)
        return h_1D

    def _rotation(self, position: int) -> Rotation:
        """In tensors of its own: views would be compiled anew for each table they are of."""
        found, whole = self.model.rotary.first(1, _CPU, position), torch.contiguous_format
        cos, sin = (t.clone(memory_format=whole) for t in (found.cos, found.sin))
        return Rotation(cos, sin, found.interleave)


PARTS: tuple[Callable[..., Any], ...] = (project, finish, head)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One graph for all layers; shapes are the model's and do not change."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def lay_out_by_columns(model: Transformer) -> None:
    """Let the weights of all products but kv_b_proj, which is read by heads, stand by columns."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and not name.endswith("kv_b_proj"):
            module.weight.data = by_columns(module.weight.data)
        elif isinstance(module, Experts):
            module.gate_up_proj.data = by_columns(module.gate_up_proj.data)
            module.down_proj.data = by_columns(module.down_proj.data)
