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
    numbers = sum(_block(config, i, recompute) for i in blocks)
    numbers += 2 * config.hidden_size  # final norm and what the head reads
    # A depth has the same two, and enorm, hnorm and eh_proj.
    numbers += depth * (6 if recompute else 8) * config.hidden_size
    chunk = min(tokens, chunk_rows(config.vocab_size, on_cpu)) * config.vocab_size
    return TrainingMemory(
        weights=weights,
        gradients=weights,
        moments=2 * weights,
        activations=tokens * numbers * compute_bytes,
        logits=4 * (chunk + (1 + depth) * parameters.vocabulary),
    )


def cache_bytes_per_token(config: ModelConfig, element_bytes: int = 2) -> int:
    """Bytes that one token takes in the latent cache: C + R numbers per layer."""
    return config.cache_dim * config.num_hidden_layers * element_bytes


def _block(config: ModelConfig, layer: int, recompute: bool) -> int:
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
