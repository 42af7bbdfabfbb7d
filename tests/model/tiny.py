"""Random tiny models of the family and their twins in `transformers`, shared by the parity tests."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

import fathom

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 128,
    "num_nextn_predict_layers": 1,
}


def tiny_config(**changes: Any) -> fathom.ModelConfig:
    """The tiny shape with some fields changed."""
    return fathom.ModelConfig(**{**TINY, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> fathom.Transformer:
    """A tiny model with weights large enough that errors would show."""
    torch.manual_seed(seed)
    model = fathom.Transformer(tiny_config(**changes))
    scramble(model)
    return model


@torch.no_grad()
def scramble(model: torch.nn.Module) -> None:
    """Weights of deviation 0.15, norms around one, router biases random and mostly negative."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "e_score_correction_bias" in name:
            tensor.normal_(-0.4, 0.3)
        elif tensor.dim() == 1 and tensor.is_floating_point() and "inv_freq" not in name:
            tensor.normal_(1.0, 0.2)
        elif "inv_freq" not in name and tensor.is_floating_point():
            tensor.normal_(0.0, 0.5 if "gate.weight" in name else 0.15)


def random_fields(rng: random.Random) -> dict[str, Any]:
    """One of the shapes that the parity promise names."""
    experts, groups = 8, rng.choice((1, 2, 4))
    yarn = rng.choice((None, YARN, {k: v for k, v in YARN.items() if not k.startswith("mscale")}))
    return {
        "q_lora_rank": rng.choice((None, 24)),
        "n_routed_experts": experts,
        "n_group": groups,
        "topk_group": rng.randint(1, groups),
        "num_experts_per_tok": rng.choice((1, 2)),
        "num_hidden_layers": 4,
        "first_k_dense_replace": rng.choice((1, 2, 3)),
        "n_shared_experts": rng.choice((1, 2)),
        "tie_word_embeddings": rng.random() < 0.5,
        "norm_topk_prob": rng.random() < 0.7,
        "routed_scaling_factor": rng.choice((1.0, 2.5)),
        "rms_norm_eps": rng.choice((1e-6, 1e-3)),
        "v_head_dim": rng.choice((4, 8, 12, 20)),
        "rope_scaling": yarn,
        "num_nextn_predict_layers": 0,
    }


def _rope_parameters(fields: dict[str, Any]) -> dict[str, Any]:
    scaling = fields.get("rope_scaling")
    if scaling is None:
        return {"rope_type": "default", "rope_theta": 10000.0}
    rest = {key: value for key, value in scaling.items() if key != "type"}
    return {"rope_type": "yarn", "rope_theta": 10000.0, **rest}


def v3_twin(fields: dict[str, Any]) -> DeepseekV3ForCausalLM:
    """`DeepseekV3ForCausalLM` of the same shape with scrambled weights."""
    known = {k: v for k, v in {**TINY, **fields}.items() if k != "rope_scaling"}
    config = DeepseekV3Config(
        **known,
        num_key_value_heads=known["num_attention_heads"],
        rope_parameters=_rope_parameters(fields),
    )
    twin = DeepseekV3ForCausalLM(config).float().eval()
    scramble(twin)
    return twin


def v2_twin(fields: dict[str, Any]) -> DeepseekV2ForCausalLM:
    """`DeepseekV2ForCausalLM` of the same shape with scrambled weights."""
    known = {k: v for k, v in {**TINY, **fields}.items() if k != "rope_scaling"}
    config = DeepseekV2Config(
        **known,
        num_key_value_heads=known["num_attention_heads"],
        rope_parameters=_rope_parameters(fields),
    )
    twin = DeepseekV2ForCausalLM(config).float().eval()
    scramble(twin)
    return twin


def ours_from(twin: torch.nn.Module, fields: dict[str, Any]) -> fathom.Transformer:
    """Our model with the twin's weights; the names in memory are the same."""
    model = fathom.Transformer(tiny_config(**fields))
    model.load_state_dict(twin.state_dict(), strict=True)
    return model
