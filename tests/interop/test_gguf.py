"""GGUF: what the file says computes what the model computes, in every shape; types, errors, memory, replacement.

The graph that llama.cpp builds from such a file is in `deepseek2_graph`; llama.cpp itself is compared in
benchmarks/gguf_vs_llama_cpp.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fathom
from fathom.errors import CheckpointError, ConfigError, FathomError
from fathom.interop import gguf as writing
from fathom.interop.gguf_keys import model_keys
from tests.interop.tiny import YARN, tiny_config, tiny_model

gguf = pytest.importorskip("gguf")

from tests.interop.deepseek2_graph import File  # noqa: E402

ROOT = Path(__file__).parents[2]
TOKENS = torch.tensor([7, 250, 0, 19, 19, 3, 101, 88, 64, 12, 200, 31, 5, 77, 256, 1, 90, 41])

SHAPES: dict[str, dict[str, Any]] = {
    "groups": {},
    "no groups": {"n_group": 1, "topk_group": 1},
    "all groups": {"topk_group": 4, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "two shared, no MTP": {"n_shared_experts": 2, "num_nextn_predict_layers": 0},
    "queries without latent": {"q_lora_rank": None},
    "tied, all experts": {"tie_word_embeddings": True, "first_k_dense_replace": 0},
    "dense": {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
    "other epsilon": {"rms_norm_eps": 1e-2},
    "halves turn": {"rope_interleave": False},
    "halves turn, queries without latent": {"rope_interleave": False, "q_lora_rank": None},
    "other base": {"rope_theta": 500.0, "v_head_dim": 24},
    "yarn": {"rope_scaling": YARN},
    "yarn, other mscale": {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "yarn, unequal": {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    "yarn, plain softmax": {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.0}},
    "yarn, given factor": {"rope_scaling": YARN | {"attention_factor": 0.8}},
    "yarn, factor one": {"rope_scaling": YARN | {"factor": 1}},
    "yarn, unscaled": {
        "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32}
        | {"attention_factor": 1.0}
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_file_computes_what_the_model_does(tmp_path: Path, name: str) -> None:
    model = tiny_model(tiny_config(**SHAPES[name]))
    fathom.save_gguf(model, tmp_path / "model.gguf")
    with torch.no_grad():
        expected = model(TOKENS[None], mtp=False).logits[0]
    difference = (File(tmp_path / "model.gguf").logits(TOKENS) - expected).abs().max()
    assert difference < 1e-4 * expected.std()


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_nextn_predict_layers": 2, "rope_interleave": False}, {"first_k_dense_replace": 3}],
)
def test_the_first_mtp_module_goes_along_if_asked_for(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = tiny_model(tiny_config(**changes))
    fathom.save_gguf(model, tmp_path / "model.gguf", mtp=True)
    file = File(tmp_path / "model.gguf")
    with torch.no_grad():
        expected = model(TOKENS[None])
    assert file.keys["nextn_predict_layers"] == 1 and file.keys["block_count"] == 4
    assert torch.allclose(file.logits(TOKENS), expected.logits[0], atol=1e-4)
    assert torch.allclose(file.mtp_logits(TOKENS), expected.mtp_logits[0][0], atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_nextn_predict_layers": 0}, "no MTP module"),
        ({"q_lora_rank": None}, "query latent"),
        ({"first_k_dense_replace": 9}, "dense"),
        ({"mtp_hidden": "pre_norm"}, "mtp_hidden='pre_norm'"),
        ({"mtp_concat_order": "hidden_first"}, "mtp_concat_order='hidden_first'"),
    ],
)
def test_an_mtp_module_that_llama_cpp_computes_otherwise_is_refused(
    changes: dict[str, Any], reason: str
) -> None:
    config = tiny_config(**changes)
    model_keys(config)
    with pytest.raises(ConfigError, match=reason):
        model_keys(config, mtp=True)


def test_v2_without_groups_too(tmp_path: Path) -> None:
    config = tiny_config("deepseek_v2", topk_method="greedy", q_lora_rank=None)
    model = tiny_model(config)
    fathom.save_gguf(model, tmp_path / "model.gguf")
    file = File(tmp_path / "model.gguf")
    assert file.keys["expert_gating_func"] == 1 and "expert_group_count" not in file.keys
    with torch.no_grad():
        expected = model(TOKENS[None]).logits[0]
    assert torch.allclose(file.logits(TOKENS), expected, atol=1e-4)


def test_keys_of_the_released_model() -> None:
    released = fathom.ModelConfig(
        max_position_embeddings=163840,
        rope_scaling=YARN | {"factor": 40, "original_max_position_embeddings": 4096},
    )
    keys = {key.removeprefix("deepseek2."): value for key, value in model_keys(released).items()}
    assert keys.pop("rope.scaling.yarn_log_multiplier") == pytest.approx(0.1)
    assert keys == {
        "vocab_size": 129280,
        "context_length": 163840,
        "embedding_length": 7168,
        "block_count": 61,
        "feed_forward_length": 18432,
        "attention.head_count": 128,
        "attention.head_count_kv": 1,
        "attention.key_length": 576,
        "attention.value_length": 512,
        "attention.key_length_mla": 192,
        "attention.value_length_mla": 128,
        "attention.kv_lora_rank": 512,
        "attention.q_lora_rank": 1536,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": 64,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 40.0,
        "rope.scaling.original_context_length": 4096,
        "leading_dense_block_count": 3,
        "expert_feed_forward_length": 2048,
        "expert_shared_count": 1,
        "expert_count": 256,
        "expert_used_count": 8,
        "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
        "expert_group_count": 8,
        "expert_group_used_count": 4,
    }


@pytest.mark.parametrize(
    ("kind", "error"), [("f16", 1e-3), ("bf16", 5e-3), ("q8_0", 0.02), ("q4_0", 0.3)]
)
def test_types(tmp_path: Path, kind: str, error: float) -> None:
    """Matrices have the type, the rest float32; rows that are no whole number of blocks stay float32."""
    config = tiny_config(qk_nope_head_dim=32, moe_intermediate_size=48)
    model = tiny_model(config)
    fathom.save_gguf(model, tmp_path / "exact.gguf", kind="f32")
    fathom.save_gguf(model, tmp_path / "model.gguf", kind=kind)
    exact, file = File(tmp_path / "exact.gguf"), File(tmp_path / "model.gguf")
    assert file.keys["general.file_type"] == gguf.LlamaFileType[writing.KINDS[kind]]
    assert set(exact.types.values()) == {"F32"} and exact.types.keys() == file.types.keys()
    for name, stored in file.types.items():
        tensor = exact.tensors[name]
        whole = not kind.startswith("q") or tensor.shape[-1] % 32 == 0
        plain = tensor.dim() == 1 or "ffn_gate_inp" in name
        assert stored == ("F32" if plain or not whole else kind.upper()), name
        assert file.tensors[name].shape == tensor.shape
        limit = 0.0 if stored == "F32" else error
        assert (file.tensors[name] - tensor).abs().max() <= limit * tensor.abs().max(), name
    assert file.types["blk.1.attn_k_b.weight"] == kind.upper()


def test_the_type_is_the_models_when_none_is_asked_for(tmp_path: Path) -> None:
    model = tiny_model(tiny_config()).bfloat16()
    fathom.save_gguf(model, tmp_path / "model.gguf")
    file = File(tmp_path / "model.gguf")
    assert file.types["blk.0.ffn_up.weight"] == "BF16"
    up = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(file.tensors["blk.0.ffn_up.weight"], up.float())
    bias = model.routers()[0].e_score_correction_bias
    assert torch.equal(file.tensors["blk.1.exp_probs_b.bias"], bias)


def test_without_a_tokenizer_there_are_ids_only(tmp_path: Path) -> None:
    fathom.save_gguf(tiny_model(tiny_config()), tmp_path / "deep" / "model.gguf")
    keys = File(tmp_path / "deep" / "model.gguf").keys
    assert keys["tokenizer.ggml.model"] == "no_vocab" and keys["vocab_size"] == 257
    assert keys["general.name"] == "model" and keys["general.architecture"] == "deepseek2"


REFUSED: dict[str, dict[str, Any]] = {
    "leading ones only": {"num_hidden_layers": 5, "moe_layer_freq": 2},
    "shared expert": {"n_shared_experts": 0},
    "whatever the file says": {"num_hidden_layers": 27},
    "best two": {"topk_method": "group_limited_greedy", "scoring_func": "softmax"},
    "more than its 1024": {"n_routed_experts": 2048},
    "always rounds": {"rope_scaling": YARN | {"truncate": False}},
    "takes 32 and 1": {"rope_scaling": YARN | {"beta_fast": 4}},
    "without stretching": {"rope_scaling": YARN | {"factor": 1, "attention_factor": 1.2}},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_model_that_llama_cpp_computes_otherwise_is_refused(reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        model_keys(tiny_config(**REFUSED[reason]))


def test_all_reasons_are_said_at_once() -> None:
    config = tiny_config(num_hidden_layers=26, n_shared_experts=0)
    with pytest.raises(ConfigError, match=r"query latent.*; n_shared_experts=0"):
        model_keys(config)
    assert model_keys(tiny_config(num_hidden_layers=26, q_lora_rank=None))


def test_numbers_that_a_type_cannot_hold(tmp_path: Path) -> None:
    model = tiny_model(tiny_config())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = 1e5
    fathom.save_gguf(model, tmp_path / "model.gguf", kind="bf16")
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up.*F16.*65504"):
        fathom.save_gguf(model, tmp_path / "other.gguf", kind="f16")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        fathom.save_gguf(model, tmp_path / "other.gguf", kind="f32")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    with pytest.raises(FathomError, match="q5_k"):
        fathom.save_gguf(model, tmp_path / "other.gguf", kind="q5_k")


def test_a_gguf_file_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    place, second = tmp_path / "model.gguf", tiny_model(tiny_config(), seed=1)
    fathom.save_gguf(tiny_model(tiny_config()), place)
    fathom.save_gguf(second, place)
    assert torch.equal(File(place).tensors["output.weight"], second.lm_head.weight)
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(CheckpointError, match="no GGUF file"):
        fathom.save_gguf(second, notes)
    with pytest.raises(CheckpointError, match=r"is a folder.*model\.gguf"):
        fathom.save_gguf(second, tmp_path)
    assert notes.read_text() == "mine"


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "model.gguf"
    fathom.save_gguf(tiny_model(tiny_config()), place)
    before = place.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "_write", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        fathom.save_gguf(tiny_model(tiny_config(), seed=1), place)
    assert place.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [
        "model.gguf"
    ]


MEASURE = """
import json, sys, torch, fathom
from tests.interop.tiny import tiny_config
torch.set_num_threads(1)
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
fathom.save_gguf(fathom.Transformer(tiny_config()), sys.argv[1], kind="f16")  # what happens the first time only
config = tiny_config(vocab_size=20000, hidden_size=256, moe_intermediate_size=512, n_routed_experts=16)
model = fathom.Transformer(config)
open("/proc/self/clear_refs", "w").write("5")  # forget the highest mark so far
before = status("VmRSS")
fathom.save_gguf(model, sys.argv[1], kind="f16")
size = sum(t.nbytes for t in model.state_dict().values())
print(json.dumps({"size": size, "saving": status("VmHWM") - before}))
"""
STATUS = Path("/proc/self/status")
HAS_MARKS = STATUS.exists() and "VmHWM" in STATUS.read_text()


@pytest.mark.skipif(not HAS_MARKS, reason="reads the memory marks of Linux")
def test_memory_is_a_piece(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model.gguf")]
    # so that the C allocator gives freed memory back at once, and the marks show what is alive
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    )
    used = json.loads(done.stdout)
    assert used["size"] > 80 * 2**20
    assert used["saving"] < 24 * 2**20
