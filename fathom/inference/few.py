"""Passes of a few rows through whole blocks of the model in one call of our C++.

Decoding reads a row or a few for each text; so does checking drafts, and so do the MTP modules. The
model itself (`Transformer.read`, `MTPModule.predict`) does the same for any number of rows and is the
reference that this must equal. It computes as the model's own modules do when nobody has replaced a
product or the dispatch, on a CPU and in float32; weights may be stored in fewer bits.

Attention is always in the latent space here: for few rows that is never much dearer.
Shapes: N rows, D hidden.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import getitem
from typing import Any, cast

import torch
from torch import Tensor, nn

from fathom.inference.layout import Places, Span, places_of
from fathom.inference.pages import Pages, texts_of
from fathom.kernels import few_rows, huge_pages, whole_blocks
from fathom.kernels.few_rows import Weights
from fathom.kernels.grouped import grouped_linear
from fathom.kernels.linear import linear
from fathom.model import Transformer
from fathom.model.attention import Attention
from fathom.model.block import Block
from fathom.model.layers import LATENT_EPS, MLP, Linear, RMSNorm
from fathom.model.moe import Experts, LocalDispatcher, MoE
from fathom.model.mtp import MTPModule, SharedHead
from fathom.model.router import Router
from fathom.model.transformer import Decoder
from fathom.precision.storage import PRODUCTS

MOST_ROWS = 128
"""Rows up to which this is the faster way: 2.5 times at 24, 1.5 to 1 at 128 (docs/experiments/012)."""

MOST_STORED = 512
"""The same where weights would have to be widened for torch's products."""


class FewRows:
    """The blocks of one model over one engine's pages, for as long as `holds` is true."""

    def __init__(self, model: Transformer, pages: Pages, size: int) -> None:
        """For a model that `suits`; `size`: tokens of a block of the cache."""
        self.model, self.pages, self.size = model, pages, size
        self._held: list[tuple[dict[str, Any], str, Tensor]] = []  # what the structures point to
        stored = model.lm_head.weight.dtype != torch.float32
        self.most = MOST_STORED if stored else MOST_ROWS
        self.shape = self._shape()
        self.layers = self._structures([cast(Block, layer) for layer in model.model.layers])
        self.modules = {
            module: self._structures([cast(Block, module)]) for module in model.model.mtp
        }
        self._dtype = model.compute_dtype
        self._owners = [owner for owner, _, _ in self._held]
        self._names = [name for _, name, _ in self._held]
        self._addresses = [tensor.data_ptr() for _, _, tensor in self._held]
        huge_pages.collapse([*(tensor for _, _, tensor in self._held), model.lm_head.weight])

    @staticmethod
    def suits(model: Transformer) -> bool:
        """Whether it is a model on a CPU that computes in float32, with products and dispatch as they came."""
        embedding = model.model.embed_tokens.weight
        if not whole_blocks.available() or embedding.device.type != "cpu":
            return False
        if embedding.dtype != torch.float32 or model.compute_dtype not in (None, torch.float32):
            return False
        return all(_plain(name, module) for name, module in model.named_modules())

    def holds(self) -> bool:
        """Whether all tensors still stand where they stood: some microseconds a layer."""
        # Without a loop of Python's: behind a pass, which has emptied the caches, each line of it costs thrice.
        tensors = map(getitem, self._owners, self._names)
        same = list(map(Tensor.data_ptr, tensors)) == self._addresses
        return same and self.model.compute_dtype == self._dtype

    def read(self, tokens: list[int], spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Hidden states before the head, and what MTP modules read, both [N, D]."""
        raw_ND = self._run(self.layers, self.model.embed(torch.tensor(tokens)), spans)
        hidden_ND = self.model.model.norm(raw_ND)
        post_norm = self.model.config.mtp_hidden == "post_norm"
        return hidden_ND, hidden_ND if post_norm else raw_ND

    def predict(
        self, module: MTPModule, states_ND: Tensor, tokens: list[int], spans: Sequence[Span]
    ) -> Tensor:
        """`MTPModule.predict` of rows (eqs 21-22): h^k [N, D]."""
        joined_ND = module.join(states_ND, self.model.embed(torch.tensor(tokens)))
        return self._run(self.modules[module], joined_ND, spans)

    def _run(
        self, layers: ctypes.Array[whole_blocks.Layer], h_ND: Tensor, spans: Sequence[Span]
    ) -> Tensor:
        places: Places = places_of(self.size, spans)
        table = self.model.rotary.first(max(places.positions) + 1, torch.device("cpu"))
        rotation = table.rows(torch.tensor(places.positions))
        first = cast(Block, self.model.model.layers[0]).self_attn
        self.shape.attention_scale, self.shape.interleave = first.scale, rotation.interleave
        texts, slots = texts_of(places.pieces), torch.tensor(places.slots)
        assert texts is not None
        return whole_blocks.read(self.shape, layers, h_ND, rotation, slots, texts)

    # --- the model as C++ reads it -----------------------------------------------------------------

    def _shape(self) -> whole_blocks.Shape:
        config, found = self.model.config, whole_blocks.Shape()
        layer = cast(Block, self.model.model.layers[0]).self_attn
        found.hidden, found.rank = config.hidden_size, config.kv_lora_rank
        found.heads, found.nope = layer.shape.heads, layer.shape.nope
        found.rope, found.value = layer.shape.rope, layer.shape.value
        found.query_rank = config.q_lora_rank or 0
        found.experts, found.choices = config.n_routed_experts, config.num_experts_per_tok
        limited = config.topk_method != "greedy"
        found.groups = max(config.n_group or 1, 1) if limited else 1
        found.kept_groups = config.topk_group if limited else 1
        found.softmax = config.scoring_func == "softmax"
        found.best_two, found.normed = config.topk_method == "noaux_tc", config.norm_topk_prob
        found.routed_scale, found.group = config.routed_scaling_factor, few_rows.GROUP
        found.eps, found.latent_eps = config.rms_norm_eps, LATENT_EPS
        return found

    def _structures(self, blocks: Sequence[Block]) -> ctypes.Array[whole_blocks.Layer]:
        return (whole_blocks.Layer * len(blocks))(*map(self._structure, blocks))

    def _structure(self, block: Block) -> whole_blocks.Layer:
        layer, found = block.self_attn, whole_blocks.Layer()
        found.input_norm = self._at(block.input_layernorm)
        found.post_norm = self._at(block.post_attention_layernorm)
        found.latent_norm = self._at(layer.kv_a_layernorm)
        if layer.config.q_lora_rank is None:
            found.query_b = self._weights(layer.q_proj)
        else:
            found.query_norm = self._at(layer.q_a_layernorm)
            found.query_a, found.query_b = map(self._weights, (layer.q_a_proj, layer.q_b_proj))
        found.latent = self._weights(layer.kv_a_proj_with_mqa)
        found.up_by_head = self._at(layer.kv_b_proj)
        found.out = self._weights(layer.o_proj)
        found.cache = self.pages.layers[layer.layer].data_ptr()
        if isinstance(block.mlp, MLP):
            self._gated(found, block.mlp)
        else:
            self._mixture(found, block.mlp)
        return found

    def _gated(self, found: whole_blocks.Layer, mlp: MLP) -> None:
        found.gate, found.up, found.down = map(
            self._weights, (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )
        found.width = mlp.gate_proj.weight.shape[0]

    def _mixture(self, found: whole_blocks.Layer, moe: MoE) -> None:
        found.router = self._at(moe.gate)
        if moe.gate.e_score_correction_bias is not None:
            found.bias = self._at(moe.gate, "e_score_correction_bias")
        experts = moe.experts
        first, second = experts.scales or (None, None)
        found.gate_up = self._stored(experts, "gate_up_proj", first)
        found.routed_down = self._stored(experts, "down_proj", second)
        found.inner = experts.down_proj.shape[-1]
        if moe.config.n_shared_experts:
            self._gated(found, moe.shared_experts)

    def _weights(self, linear: Linear) -> Weights:
        return self._stored(linear, "weight", linear.scales)

    def _stored(self, module: nn.Module, name: str, scales: Tensor | None) -> Weights:
        self._at(module, name)
        if scales is not None:
            self._held.append(({name: scales}, name, scales))
        return Weights.of(getattr(module, name), scales)

    def _at(self, module: nn.Module, name: str = "weight") -> int:
        owner: dict[str, Any] = (
            module._parameters if name in module._parameters else module._buffers
        )
        self._held.append((owner, name, owner[name].detach()))
        return owner[name].data_ptr()


_KNOWN = {
    *(Transformer, Decoder, Block, MTPModule, SharedHead, Attention, RMSNorm, Linear, MLP),
    *(MoE, Router, Experts, nn.ModuleList, nn.Embedding),
}
"""What C++ knows how to do; a class derived from one of them may do anything."""


def _plain(name: str, module: nn.Module) -> bool:
    """Whether C++ does what this module does, and reads its numbers where they stand."""
    if type(module) not in _KNOWN or module._forward_hooks or module._forward_pre_hooks:
        return False
    numbers = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if isinstance(module, Linear | Experts):
        narrow = module.compute_dtype is not None and not name.endswith("kv_b_proj")
        ours = module.matmul in (linear, grouped_linear) or type(module.matmul) in PRODUCTS
        wide = module.compute_dtype in (None, torch.float32)
        kinds = all(narrow or number.dtype == torch.float32 for number in numbers)
        return ours and wide and kinds and all(map(few_rows.readable, numbers))
    if isinstance(module, RMSNorm | Router):
        real = [number for number in numbers if number.is_floating_point()]  # not the counted load
        return all(few_rows.readable(n) and n.dtype == torch.float32 for n in real)
    return not isinstance(module, MoE) or type(module.dispatcher) is LocalDispatcher
