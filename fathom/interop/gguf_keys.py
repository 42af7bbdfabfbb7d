"""What a GGUF file says of a model (architecture `deepseek2`), and which models llama.cpp would compute otherwise.

llama.cpp always attends in the latent space (`fathom.kernels.attention`, absorbed): to it a layer has one key head
of C + R numbers, the first C of which are the value too. The sizes of the expanded heads have keys of their own, ending
in `_mla`. What a key means is llama.cpp's choice and read from its source (src/models/deepseek2.cpp and the files
around it); docs/gguf.md says which version.

Letters: C latent rank, R rotary dimensions, P dimensions without rotation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fathom.errors import ConfigError
from fathom.model.config import ModelConfig
from fathom.model.rope import magnitude, softmax_scale

ARCHITECTURE = "deepseek2"
SOFTMAX, SIGMOID = 1, 2
"""llama.cpp's numbers for the gating function. A file without the key counts as softmax."""
MOST_EXPERTS = 1024
MOST_LAYERS = 512

Value = int | float | bool | str
"""An integer is written as unsigned 32 bits, a float as 32 bits."""


def model_keys(config: ModelConfig, mtp: bool = False) -> dict[str, Value]:
    """Every key under `deepseek2.`; `mtp`: the first MTP module goes along.

    Raises `ConfigError` for a model that llama.cpp cannot compute.
    """
    reasons = [*_obstacles(config), *(_mtp_obstacles(config) if mtp else ())]
    if reasons:
        raise ConfigError("llama.cpp cannot compute this model: " + "; ".join(reasons))
    keys = _sizes(config, mtp) | _attention(config) | _rope(config) | _experts(config, mtp)
    return {f"{ARCHITECTURE}.{key}": value for key, value in keys.items()}


def dense_layers(config: ModelConfig) -> int:
    """Leading layers without experts; all of them when none has any."""
    layers = range(config.num_hidden_layers)
    return next((i for i in layers if config.is_moe_layer(i)), config.num_hidden_layers)


def limits_groups(config: ModelConfig) -> bool:
    """Whether a token's choice is really limited: with every group allowed there is nothing to say."""
    return config.topk_method != "greedy" and config.topk_group < config.n_group


def _obstacles(config: ModelConfig) -> Iterator[str]:
    """Why llama.cpp would refuse a file of this model or, worse, compute something else."""
    layers, dense = config.num_hidden_layers, dense_layers(config)
    if layers > MOST_LAYERS:
        yield f"num_hidden_layers={layers} is more than its {MOST_LAYERS}"
    if config.q_lora_rank is not None and _is_lite(config):
        yield (
            f"a model of num_hidden_layers={layers} and vocab_size={config.vocab_size} is taken for one without a "
            f"query latent, whatever the file says (q_lora_rank={config.q_lora_rank}); train with another depth"
        )
    if dense < layers:
        yield from _expert_obstacles(config, dense)
    yield from _rope_obstacles(config)


def _is_lite(config: ModelConfig) -> bool:
    """How llama.cpp tells the shapes whose q_lora_rank it does not read."""
    layers = config.num_hidden_layers
    return layers in (26, 27) or (layers == 48 and config.vocab_size == 128_256)


def _expert_obstacles(config: ModelConfig, dense: int) -> Iterator[str]:
    if not all(config.is_moe_layer(i) for i in range(dense, config.num_hidden_layers)):
        yield (
            f"moe_layer_freq={config.moe_layer_freq} puts dense layers between those with experts, and it knows "
            f"leading ones only; use moe_layer_freq=1"
        )
    if not config.n_shared_experts:
        yield "n_shared_experts=0, and it wants one at least; train with a shared expert"
    if config.n_routed_experts > MOST_EXPERTS:
        yield f"n_routed_experts={config.n_routed_experts} is more than its {MOST_EXPERTS}"
    if config.topk_method == "group_limited_greedy" and limits_groups(config):
        yield (
            "topk_method='group_limited_greedy' ranks groups by their best expert, but it ranks them by the sum of the "
            "best two; topk_method='noaux_tc' and 'greedy' can be written"
        )


def _rope_obstacles(config: ModelConfig) -> Iterator[str]:
    scaling = config.rope_scaling
    if scaling is None:
        return
    if scaling["factor"] == 1:
        if magnitude(config) != 1:
            yield (
                f"rope_scaling has factor=1 with attention_factor={magnitude(config)}, and it scales nothing without "
                f"stretching"
            )
        return
    if not scaling.get("truncate", True):
        yield "rope_scaling has truncate=false, and it always rounds the range between which YaRN blends"
    fast, slow = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
    if (fast, slow) != (32, 1):
        yield (
            f"rope_scaling has beta_fast={fast:g} and beta_slow={slow:g}, and it takes 32 and 1 whatever the file says"
        )


def _mtp_obstacles(config: ModelConfig) -> Iterator[str]:
    """What its graph of the MTP module takes for granted."""
    if not config.num_nextn_predict_layers:
        yield "there is no MTP module to write; leave it out"
    if config.q_lora_rank is None:
        yield "its MTP modules have a query latent, this one has q_lora_rank=None; leave it out"
    if not config.is_moe_layer(config.num_hidden_layers):
        yield "its MTP modules have experts, this one is dense; leave it out"
    if (config.mtp_concat_order, config.mtp_hidden) != ("embedding_first", "post_norm"):
        yield (
            f"its MTP modules read the embedding first and the state after the norm, this one has "
            f"mtp_concat_order={config.mtp_concat_order!r} and mtp_hidden={config.mtp_hidden!r}; leave it out"
        )


def _sizes(config: ModelConfig, mtp: bool) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers + mtp,
        "feed_forward_length": config.intermediate_size,
    }
    return keys | {"nextn_predict_layers": 1} if mtp else keys


def _attention(config: ModelConfig) -> dict[str, Value]:
    """Heads as they are in the latent space, and (`_mla`) as they are expanded.

    q_lora_rank is 0 for queries without a latent: the key must be there, and 0 makes llama.cpp look for `attn_q`.
    """
    return {
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.q_lora_rank": config.q_lora_rank or 0,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }


def _rope(config: ModelConfig) -> dict[str, Value]:
    """Base, and YaRN where it stretches (see `yarn_factors`)."""
    keys: dict[str, Value] = {
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    scaling = config.rope_scaling
    if scaling is None or scaling["factor"] == 1:
        return keys
    multiplier, factor = yarn_factors(config, scaling["factor"])
    keys |= {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(scaling["factor"]),
        "rope.scaling.original_context_length": int(scaling["original_max_position_embeddings"]),
        "rope.scaling.yarn_log_multiplier": 0.1 * multiplier,
    }
    if factor != 1:
        keys["rope.scaling.attn_factor"] = factor
    return keys


def yarn_factors(config: ModelConfig, stretch: float) -> tuple[float, float]:
    """llama.cpp's two numbers under YaRN: (a, f) that give our magnitude m of cos and sin, and our softmax scale.

    With L = 0.1 ln(stretch) it computes

        m = f            if a is not 0, else f (1 + L)
        scale = m^2 (1 + a L)^2 / sqrt(P + R)

    so a = (sqrt(scale sqrt(P + R)) / m - 1) / L. At the released settings m = 1 and a is `mscale_all_dim`. The file
    holds 0.1 a: the factor is a leftover of older versions, which llama.cpp takes out again.
    """
    m, log = magnitude(config), 0.1 * math.log(stretch)
    sharpening = math.sqrt(softmax_scale(config) * math.sqrt(config.qk_head_dim))
    a = (sharpening / m - 1) / log
    if abs(a) < 1e-9:  # nothing but rounding
        return 0.0, m / (1 + log)
    return a, m


def _experts(config: ModelConfig, mtp: bool) -> dict[str, Value]:
    dense = dense_layers(config)
    keys: dict[str, Value] = {
        "leading_dense_block_count": dense,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
    }
    if dense == config.num_hidden_layers and not mtp:
        return keys
    keys |= {
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": config.norm_topk_prob,
        "expert_gating_func": SIGMOID if config.scoring_func == "sigmoid" else SOFTMAX,
    }
    if limits_groups(config):
        keys |= {
            "expert_group_count": config.n_group,
            "expert_group_used_count": config.topk_group,
        }
    return keys
