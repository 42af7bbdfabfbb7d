"""Memory of one training process by class, and of the latent cache (report §2.1.1, §3.2.3, §3.3.3).

Weights, gradients and moments follow from the parameter count. Activations are what the autograd rules of
`fathom.kernels` keep between forward and backward, tensor by tensor. Allocator slack and the moment's working tensors
come on top, so the sum is an estimate from below.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from fathom.kernels.cross_entropy import chunk_rows
from fathom.model import ModelConfig
from fathom.planning.parameters import count_parameters


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes by class."""

    weights: int
    """Master weights."""
    gradients: int
    """As large as the masters."""
    moments: int
    """AdamW's two moments."""
    activations: int
    """Kept for the backward pass of one micro-batch."""
    logits: int
    """One chunk of logits, and the head's gradient that every loss makes while it has them (one more per MTP depth)."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def training_memory(
    config: ModelConfig,
    seq_len: int,
    micro_batch: int,
    *,
    master_bytes: int = 4,
    compute_bytes: int = 4,
    recompute: bool = False,
    mtp: bool = True,
    on_cpu: bool = True,
) -> TrainingMemory:
    """Bytes for training with micro-batches of `micro_batch` sequences; `compute_bytes` is 2 for BF16 products.

    `on_cpu`: whether it is trained on a CPU, where fewer logits exist at a time than on a GPU.
    """
    parameters = count_parameters(config)
    weights = parameters.trained * master_bytes
    depth = config.num_nextn_predict_layers if mtp else 0
    tokens = seq_len * micro_batch
    blocks = range(config.num_hidden_layers + depth)
    numbers = sum(block_activations(config, i, recompute) for i in blocks)
    numbers += end_activations(config, depth, recompute)
    return TrainingMemory(
        weights=weights,
        gradients=weights,
        moments=2 * weights,
        activations=tokens * numbers * compute_bytes,
        logits=logits_bytes(config, tokens, depth, on_cpu),
    )


def end_activations(config: ModelConfig, depth: int, recompute: bool) -> int:
    """Numbers per token kept behind the last block: final norm and what the head reads; each of `depth` MTP modules has
    the same two, and enorm, hnorm and eh_proj.
    """
    return (2 + depth * (6 if recompute else 8)) * config.hidden_size


def logits_bytes(config: ModelConfig, tokens: int, depth: int, on_cpu: bool) -> int:
    """One chunk of logits, and the head's gradient that every loss makes while it has them."""
    chunk = min(tokens, chunk_rows(config.vocab_size, on_cpu)) * config.vocab_size
    return 4 * (chunk + (1 + depth) * config.vocab_size * config.hidden_size)


def cache_bytes_per_token(config: ModelConfig, element_bytes: int = 2) -> int:
    """Bytes that one token takes in the latent cache: C + R numbers per layer."""
    return config.cache_dim * config.num_hidden_layers * element_bytes


def block_activations(config: ModelConfig, layer: int, recompute: bool) -> int:
    """Numbers per token that one block keeps; `recompute` makes norms, up-projections and SwiGLU again."""
    residual = (2 if recompute else 4) * config.hidden_size
    return residual + _attention(config, recompute) + _feed_forward(config, layer, recompute)


def _attention(config: ModelConfig, recompute: bool) -> int:
    H, C, R = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    rank, value = config.q_lora_rank or 0, config.v_head_dim
    latents = rank + C + R if recompute else 2 * (rank + C) + R
    raw = H * (config.qk_head_dim + config.qk_nope_head_dim + value)
    if recompute:
        raw = 0 if rank else H * config.qk_head_dim
    # Of the heads: the kernel's output, and the output projection's input.
    return latents + raw + R + H * (config.qk_head_dim + value)


def _feed_forward(config: ModelConfig, layer: int, recompute: bool) -> int:
    kept = 2 if recompute else 3  # gate and up, and their product
    if not config.is_moe_layer(layer):
        return kept * config.intermediate_size
    K, inner = config.num_experts_per_tok, config.moe_intermediate_size
    routed = K * (2 * config.hidden_size + kept * inner) + 2 * config.n_routed_experts
    return routed + kept * config.n_shared_experts * inner


def fp8_block_bytes(config: ModelConfig, layer: int) -> float:
    """Bytes per token that one block keeps with the report's recomputation (§3.2.3) and low-precision storage (§3.3.3).

    BF16: what norms and MLA up-projections are made again from. E5M6, 12 bits and a scale: attention's output, which
    both attention's backward and the output projection's read. FP8: what experts receive and what SwiGLU is made from.
    """
    c, fp8, e5m6 = config, 1 + 4 / 128, 12 / 8 + 4 / 128
    residual = 2 * 2 * c.hidden_size
    latents = 2 * ((c.q_lora_rank or c.hidden_size) + c.cache_dim)
    heads = c.num_attention_heads * (c.v_head_dim * e5m6 + 4)  # 4: logsumexp
    if not c.is_moe_layer(layer):
        return residual + latents + heads + 2 * c.intermediate_size * fp8
    experts = c.num_experts_per_tok + c.n_shared_experts
    inner = experts * 2 * c.moe_intermediate_size * fp8
    routing = 4 * 2 * c.n_routed_experts
    return (
        residual + latents + heads + c.num_experts_per_tok * c.hidden_size * fp8 + inner + routing
    )
