"""`config.json` in and out: the released style, and the one `transformers` 5 writes.

Both name nearly every field alike; they differ in rotary settings (`rope_theta` + `rope_scaling`
against one `rope_parameters`) and in what they leave out, which then has the family's default. Keys
that say nothing about shape or arithmetic are other people's notes and are ignored. We write the
released style, which every tool reads. Field by field: report §4.2 and the released files.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fathom.errors import CheckpointError, ConfigError
from fathom.model.config import YARN_NUMBERS, ModelConfig

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
}
# What DeepSeek's own V2 configuration class assumes of a key that is absent; V3's are ModelConfig's defaults.
V2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 2048,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}
ALIASES = {
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}
# Null has a meaning of its own for these: queries without a latent, no groups, none of a kind.
NULLS: dict[str, int | None] = {
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 0,
    "num_nextn_predict_layers": 0,
}
ROPE_KEYS = (*YARN_NUMBERS, "truncate")
# Written only when they differ: the released file does not know them, and means these values.
OURS = {"rope_interleave": True, "mtp_concat_order": "embedding_first", "mtp_hidden": "post_norm"}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `CheckpointError` when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; a Hugging Face directory needs one"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch it again")
    return content


def read_config(directory: str | Path) -> ModelConfig:
    """The configuration of a Hugging Face directory."""
    return from_json(read_json(Path(directory) / "config.json"))


def from_json(content: dict[str, Any]) -> ModelConfig:
    """A `ModelConfig` from the content of a `config.json`, either style. Raises `ConfigError`."""
    family = content.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise ConfigError(
            f"model_type {family!r} is not supported; use one of {', '.join(ARCHITECTURES)}"
        )
    _refuse_other_architectures(content)
    known = {ALIASES.get(key, key): value for key, value in content.items() if value is not None}
    values = dict(V2_DEFAULTS) if family == "deepseek_v2" else {}
    values |= {
        field.name: known[field.name] for field in fields(ModelConfig) if field.name in known
    }
    values |= {key: value for key, value in NULLS.items() if content.get(key, 0) is None}
    values["eos_token_id"] = _first(values.get("eos_token_id", ModelConfig.eos_token_id))
    if values.get("topk_method") == "gready":  # as early V2 files spell it
        values["topk_method"] = "greedy"
    return ModelConfig(**values | _read_rope(content))


def _first(ids: int | list[int]) -> int:
    """`transformers` allows several end tokens; the first one is the model's."""
    return ids[0] if isinstance(ids, list) and ids else ids  # type: ignore[return-value]


def _refuse_other_architectures(content: dict[str, Any]) -> None:
    """What a file can say that this code would compute wrongly."""
    if content.get("attention_bias") or content.get("mlp_bias"):
        raise ConfigError(
            "attention_bias or mlp_bias is true, but this family has no biases; "
            "load a checkpoint without them"
        )
    heads, kv_heads = content.get("num_attention_heads"), content.get("num_key_value_heads")
    if None not in (heads, kv_heads) and heads != kv_heads:
        raise ConfigError(
            f"num_key_value_heads={kv_heads} differs from num_attention_heads={heads}, but MLA gives every "
            f"head its own keys; set them equal"
        )


def _read_rope(content: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from either style, YaRN's keys alone and under their released names."""
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_scaling is {rope!r}; it must be a table with 'type' and 'factor'")
    theta = rope.get("rope_theta", content.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ConfigError(
            f"rope type {kind!r} is not supported; use 'yarn', or 'default' for plain RoPE"
        )
    found: dict[str, Any] = {} if theta is None else {"rope_theta": float(theta)}
    if kind == "yarn":
        kept = {key: rope[key] for key in ROPE_KEYS if rope.get(key) is not None}
        found["rope_scaling"] = {"type": "yarn", **kept}
    else:
        found["rope_scaling"] = None
    return found


def to_json(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of a `config.json` in the released style, for weights stored as `dtype`."""
    content = config.to_dict()
    for key, released in OURS.items():
        if content[key] == released:
            del content[key]
    content |= {
        "architectures": [ARCHITECTURES[config.model_type]],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "ep_size": 1,
        "num_key_value_heads": config.num_attention_heads,
        "rope_scaling": _write_rope(config.rope_scaling),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
    return dict(sorted(content.items()))


def _write_rope(rope: dict[str, Any] | None) -> dict[str, Any] | None:
    """YaRN settings with both mscale keys: without them readers disagree about the softmax."""
    if rope is None:
        return None
    kept = {key: rope[key] for key in ROPE_KEYS if rope.get(key) is not None}
    if "mscale" not in kept and "mscale_all_dim" not in kept:
        kept |= {"mscale": 1.0, "mscale_all_dim": 0.0}  # what their absence means
    return dict(sorted(kept.items())) | {"type": "yarn"}


def fp8_block(content: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns per scale of an FP8 directory, 128 x 128 unless it says otherwise. Raises `ConfigError`."""
    quantization = content.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise ConfigError(f"quantization_config is {quantization!r}; it must be a table")
    method = quantization.get("quant_method", "fp8")
    if method != "fp8":
        raise ConfigError(
            f"quant_method {method!r} cannot be read; use a BF16, FP16, FP32 or block-FP8 copy"
        )
    block = quantization.get("weight_block_size") or (128, 128)
    sizes = list(block) if isinstance(block, list | tuple) else []
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ConfigError(f"weight_block_size is {block!r}; it must be two positive numbers")
    return sizes[0], sizes[1]
