"""The shapes that are compared, as fields of the released config.json, and their configurations on
both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fathom import ModelConfig

NANO: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 16384,
    "initializer_range": 0.02,
}
MINI: dict[str, Any] = {
    **NANO,
    "vocab_size": 32768,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 12,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 32,
}


@dataclass(frozen=True)
class Case:
    """A shape with the batch it is trained on."""

    label: str
    fields: dict[str, Any]
    batch: int
    seq_len: int

    @property
    def name(self) -> str:
        return f"{self.label} {self.batch}x{self.seq_len}"


def with_experts(count: int) -> dict[str, Any]:
    """Nano with another number of experts of the same size, four of them used per token."""
    return {**NANO, "n_routed_experts": count}


CASES = {
    "nano": [Case("nano", NANO, 8, 512)],
    "mini": [Case("mini", MINI, 8, 512)],
    "mini-small": [Case("mini", MINI, 2, 512)],
    "nano-2048": [Case("nano", NANO, 1, 2048)],
    "nano-4096": [Case("nano", NANO, 1, 4096)],
    "experts": [Case(f"nano, {n} experts", with_experts(n), 2, 512) for n in (8, 64, 256)],
}


def fathom_config(fields: dict[str, Any]) -> ModelConfig:
    """Ours, without MTP modules."""
    return ModelConfig(**fields, num_nextn_predict_layers=0)


def fields_of(config: ModelConfig) -> dict[str, Any]:
    """What both sides need of a configuration of ours, in released names."""
    return {name: getattr(config, name) for name in NANO}


def transformers_config(fields: dict[str, Any]) -> Any:
    """The same for `transformers`."""
    from transformers import DeepseekV3Config

    return DeepseekV3Config(num_key_value_heads=fields["num_attention_heads"], **fields)
