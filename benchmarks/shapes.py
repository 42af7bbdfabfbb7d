"""The shapes that are compared, as fields of the released config.json, and their configurations on
both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fathom import ModelConfig, load_recipe

FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "first_k_dense_replace",
    "max_position_embeddings",
    "initializer_range",
)


def fields_of(config: ModelConfig) -> dict[str, Any]:
    """What both sides need of a configuration of ours, in released names."""
    return {name: getattr(config, name) for name in FIELDS}


def _recipe(name: str) -> dict[str, Any]:
    """A recipe's shape with one group of experts and room for long contexts."""
    shape = load_recipe(name).model
    return fields_of(shape.replace(n_group=1, topk_group=1, max_position_embeddings=16384))


NANO, MINI = _recipe("nano"), _recipe("mini")

WIDE = {
    **MINI,
    "hidden_size": 2048,
    "num_hidden_layers": 8,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "moe_intermediate_size": 512,
}
"""1.7 billion parameters, 0.3 of them for each token: beyond every cache of a CPU."""


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


def transformers_config(fields: dict[str, Any]) -> Any:
    """The same for `transformers`."""
    from transformers import DeepseekV3Config

    return DeepseekV3Config(num_key_value_heads=fields["num_attention_heads"], **fields)
