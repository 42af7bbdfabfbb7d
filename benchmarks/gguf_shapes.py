"""Tiny models of every shape that can be written as GGUF: what differs from a small V3, as fields of config.json."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
    "num_nextn_predict_layers": 0,
}
YARN = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
V2 = {
    "model_type": "deepseek_v2",
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "V3, groups": {},
    "V3, groups, YaRN": {"rope_scaling": YARN},
    "one group": {"n_group": 1, "topk_group": 1},
    "all groups allowed": {"topk_group": 4},
    "64 experts, top 6 of 3 in 8 groups": {
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
    },
    "two shared experts": {"n_shared_experts": 2},
    "weights not normed": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "no dense layer, tied": {"first_k_dense_replace": 0, "tie_word_embeddings": True},
    "dense only": {"first_k_dense_replace": 3},
    "no query latent": {"q_lora_rank": None},
    "no query latent, 27 layers": {"q_lora_rank": None, "num_hidden_layers": 27},
    "MTP module left out": {"num_nextn_predict_layers": 1},
    "odd sizes": {"kv_lora_rank": 20, "qk_nope_head_dim": 10, "v_head_dim": 14, "q_lora_rank": 36},
    "epsilon 1e-5": {"rms_norm_eps": 1e-5},
    "epsilon 1e-2": {"rms_norm_eps": 1e-2},
    "halves turn": {"rope_interleave": False},
    "halves turn, no query latent": {"rope_interleave": False, "q_lora_rank": None},
    "base 500": {"rope_theta": 500.0},
    "YaRN, mscale 0.707": {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "YaRN, unequal mscales": {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    "YaRN, plain softmax": {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.0}},
    "YaRN, factor of attention given": {"rope_scaling": YARN | {"attention_factor": 0.8}},
    "YaRN, unscaled": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.0,
        }
    },
    "V2, no groups": V2,
    "V2, YaRN, no query latent": V2 | {"q_lora_rank": None, "rope_scaling": YARN},
}
