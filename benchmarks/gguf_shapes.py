"""Tiny models of every shape that can be written as GGUF: what differs from a small V3, as fields of config.json."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

import fathom
from fathom.model.moe import MoE
from fathom.model.router import affinities

CLEAR = 1e-5
"""The least margin of every choice of experts: programs that round differently still choose alike."""
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


def draw(fields: dict[str, Any], length: int) -> tuple[fathom.Transformer, Tensor]:
    """A random model and tokens [T] on which each of its choices of experts is clear."""
    config = fathom.ModelConfig(**fields)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.vocab_size, (length,), generator=generator)
    for seed in range(100):
        model = random_model(fields, seed)
        if _least_margin(model, tokens) >= CLEAR:
            return model, tokens
    raise RuntimeError(f"no clear choices in 100 models of {length} tokens; use fewer tokens")


def random_model(fields: dict[str, Any], seed: int = 0) -> fathom.Transformer:
    """Every tensor random, norms and (also negative) router biases included."""
    torch.manual_seed(seed)
    model = fathom.Transformer(fathom.ModelConfig(**fields)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                tensor.normal_(1.0, 0.2)
            elif tensor.dim() == 1:
                tensor.normal_(0.0, 0.2)
            else:
                tensor.normal_(0.0, 1.2 * tensor.shape[-1] ** -0.5)
    return model


def _least_margin(model: fathom.Transformer, tokens: Tensor) -> float:
    """By how much the last expert or group chosen is ahead of the first that is not, over all tokens and layers."""
    margins = [float("inf")]
    blocks = [cast(MoE, module) for module in model.modules() if isinstance(module, MoE)]
    for block in blocks:

        def look(moe: MoE, _: Any, logits: Tensor) -> None:
            bias = moe.gate.e_score_correction_bias
            scores = affinities(logits.flatten(0, -2), model.config)
            margins.append(_margin(scores if bias is None else scores + bias, model.config))

        block.gate.register_forward_hook(lambda _, x, y, moe=block: look(moe, x, y))
    with torch.inference_mode():
        model(tokens[None])
    for block in blocks:
        block.gate._forward_hooks.clear()
    return min(margins)


def _margin(choice_NE: Tensor, config: fathom.ModelConfig) -> float:
    """Of one layer's biased scores: the lesser of the groups' margin and the experts'."""
    groups, kept = config.n_group, config.topk_group
    least = float("inf")
    if config.topk_method == "noaux_tc" and kept < groups:
        grouped = choice_NE.unflatten(-1, (groups, -1))
        best = grouped.topk(2).values.sum(-1).sort(descending=True)
        least = float((best.values[:, kept - 1] - best.values[:, kept]).min())
        allowed = torch.zeros_like(best.values, dtype=torch.bool)
        allowed.scatter_(-1, best.indices[:, :kept], True)
        choice_NE = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
    ordered = choice_NE.sort(descending=True).values
    K = config.num_experts_per_tok
    return min(least, float((ordered[:, K - 1] - ordered[:, K]).min()))
