"""config.json: both styles are read to one configuration; what we write, `transformers` reads alike."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fathom.errors import CheckpointError, ConfigError
from fathom.interop.config_json import fp8_block, from_json, read_config, to_json
from fathom.model.config import ModelConfig
from tests.interop.tiny import YARN, tiny_config

# The released file of the 671B model, shortened to what is not default in ModelConfig, and to others' notes.
RELEASED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "initializer_range": 0.02,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "seq_aux": True,
    "torch_dtype": "bfloat16",
}


def test_released_file() -> None:
    config = from_json(RELEASED)
    scaling = RELEASED["rope_scaling"]
    assert config == ModelConfig(
        initializer_range=0.02, max_position_embeddings=163840, rope_scaling=scaling
    )
    assert fp8_block(RELEASED) == (128, 128)


@pytest.mark.parametrize("scaling", [None, YARN])
def test_transformers_style(scaling: dict[str, Any] | None) -> None:
    config = tiny_config(rope_scaling=scaling, rope_theta=5000.0)
    content = to_json(config, torch.float32)
    del content["rope_theta"], content["rope_scaling"]
    content |= {"num_local_experts": content.pop("n_routed_experts")}
    content |= {"num_mtp_layers": content.pop("num_nextn_predict_layers")}
    rope = {"rope_type": "default"} if scaling is None else scaling | {"rope_type": "yarn"}
    assert from_json(content | {"rope_parameters": rope | {"rope_theta": 5000.0}}) == config


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_k2", "deepseek_v2"])
@pytest.mark.parametrize("scaling", [None, YARN])
def test_round_trip_through_transformers(family: str, scaling: dict[str, Any] | None) -> None:
    transformers = pytest.importorskip("transformers")
    config = tiny_config(family, rope_scaling=scaling, rope_theta=5000.0, q_lora_rank=None)
    content = json.loads(json.dumps(to_json(config, torch.bfloat16)))
    assert from_json(content) == config
    kind = getattr(transformers, content["architectures"][0].removesuffix("ForCausalLM") + "Config")
    theirs = kind.from_dict(dict(content))
    assert theirs.rope_parameters["rope_theta"] == 5000.0
    for key in (
        "q_lora_rank",
        "n_routed_experts",
        "n_group",
        "first_k_dense_replace",
        "routed_scaling_factor",
    ):
        assert getattr(theirs, key) == getattr(config, key), key
    for key, value in (scaling or {"rope_type": "default"}).items():
        assert theirs.rope_parameters[key] == value, key
    assert theirs.dtype == torch.bfloat16
    assert from_json(theirs.to_dict() | {"model_type": family}) == config.replace(
        initializer_range=0.006
    )


def test_v2_defaults() -> None:
    config = from_json(
        {"model_type": "deepseek_v2", "n_group": None, "topk_group": None, "q_lora_rank": None}
    )
    assert (config.scoring_func, config.topk_method, config.norm_topk_prob) == (
        "softmax",
        "greedy",
        False,
    )
    assert (config.n_group, config.topk_group, config.q_lora_rank) == (1, 1, None)
    assert config.num_nextn_predict_layers == 0


def test_both_mscale_keys_are_always_written() -> None:
    bare = {key: YARN[key] for key in ("type", "factor", "original_max_position_embeddings")}
    written = to_json(tiny_config(rope_scaling=bare), torch.float32)["rope_scaling"]
    assert (written["mscale"], written["mscale_all_dim"]) == (1.0, 0.0)


def test_our_own_fields_survive_and_are_silent_by_default() -> None:
    assert not {"mtp_hidden", "mtp_concat_order", "rope_interleave"} & set(
        to_json(tiny_config(), torch.float32)
    )
    ours = tiny_config(
        mtp_hidden="pre_norm", mtp_concat_order="hidden_first", rope_interleave=False
    )
    assert from_json(to_json(ours, torch.float32)) == ours


def test_several_end_tokens() -> None:
    assert from_json(RELEASED | {"eos_token_id": [5, 6]}).eos_token_id == 5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"model_type": None}, "model_type None"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
        ({"n_group": 7}, "n_group=7"),
        ({"model_type": ["deepseek_v3"]}, "model_type"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
    ],
)
def test_what_cannot_be_computed_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        from_json(RELEASED | change)


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "awq"}, "'awq'"),
        ("fp8", "quantization_config is 'fp8'"),
        ({"weight_block_size": [128]}, "weight_block_size"),
        ({"weight_block_size": [0, 128]}, "weight_block_size"),
        ({"weight_block_size": 128}, "weight_block_size"),
    ],
)
def test_unknown_quantisation(quantization: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        fp8_block({"quantization_config": quantization})


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_unreadable_file(tmp_path: Any, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)
