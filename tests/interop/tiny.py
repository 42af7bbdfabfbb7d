"""Tiny models of each family for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch

from fathom.model.config import ModelConfig
from fathom.model.transformer import Transformer

YARN = {
    "type": "yarn",
    "factor": 4,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_V2 = {
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 4.0,
    "num_nextn_predict_layers": 0,
}


def tiny_config(family: str = "deepseek_v3", **changes: Any) -> ModelConfig:
    """Three layers, one of them dense; 8 experts in 4 groups; one MTP module except for V2."""
    base: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "n_routed_experts": 8,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 128,
        "model_type": family,
    }
    return ModelConfig(**base | (_V2 if family == "deepseek_v2" else {}) | changes)


def tiny_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model whose every tensor is random, norms and (also negative) router biases included."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            mean, std = (1.0, 0.1) if "norm" in name else (0.0, 0.1)
            tensor.normal_(mean, std)
    return model
