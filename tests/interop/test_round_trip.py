"""Directories in and out: ours to ours, ours to `transformers` and back, all bit-exact, logits equal."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fathom
from fathom.interop.config_json import from_json, to_json
from tests.interop.tiny import YARN, tiny_config, tiny_model
from tests.shared_data import shared_data


def assert_equal(ours: fathom.Transformer, theirs: dict[str, Tensor]) -> None:
    mine = ours.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_nextn_predict_layers": 2, "tie_word_embeddings": True, "n_shared_experts": 2},
        {"q_lora_rank": None, "rope_scaling": YARN, "num_nextn_predict_layers": 0},
        {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1},
        {"mtp_concat_order": "hidden_first", "mtp_hidden": "pre_norm", "n_shared_experts": 0},
    ],
)
def test_ours_to_ours(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny_model(tiny_config(**changes))
    fathom.save(model, tmp_path / "m", max_shard_bytes=60_000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fathom.load(tmp_path / "m")
    assert again.config == model.config and not again.training
    assert_equal(again, model.state_dict())
    assert (
        again.lm_head.weight is again.model.embed_tokens.weight
    ) == model.config.tie_word_embeddings
    tokens = torch.randint(257, (2, 9))
    mine, theirs = model(tokens), again(tokens)
    assert torch.equal(mine.logits, theirs.logits)
    assert all(map(torch.equal, mine.mtp_logits, theirs.mtp_logits))
    fathom.losses(again.train(), tokens).total.backward()  # nothing was left on the meta device


def test_files_have_the_released_names_and_sizes(tmp_path: Path) -> None:
    model = tiny_model(tiny_config())
    fathom.save(model, tmp_path, dtype=torch.bfloat16, max_shard_bytes=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shapes, total = {}, 0
    for file in tmp_path.glob("*.safetensors"):
        shard = load_file(file)
        size = sum(t.nbytes for t in shard.values())
        assert size <= 60_000 or len(shard) == 1
        total += size
        shapes |= {name: list(t.shape) for name, t in shard.items()}
        assert all(index["weight_map"][name] == file.name for name in shard)
    assert index["weight_map"].keys() == shapes.keys()
    assert index["metadata"]["total_size"] == total
    assert shapes["model.layers.2.mlp.experts.7.up_proj.weight"] == [32, 64]
    assert shapes["model.layers.1.mlp.experts.0.down_proj.weight"] == [64, 32]
    for duplicate in ("embed_tokens.weight", "shared_head.head.weight"):
        assert shapes[f"model.layers.3.{duplicate}"] == [257, 64]
    assert shapes["model.layers.3.eh_proj.weight"] == [64, 128]
    assert not any("mtp" in name or "gate_up" in name for name in shapes)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 1}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_dtypes(tmp_path: Path, dtype: torch.dtype | None) -> None:
    model = tiny_model(tiny_config())
    fathom.save(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = fathom.load(tmp_path, dtype=dtype)
    for name, tensor in again.state_dict().items():
        original = model.state_dict()[name]
        if "e_score_correction_bias" in name:
            assert tensor.dtype == torch.float32 and torch.equal(tensor, original)
        else:
            assert tensor.dtype == (dtype or torch.bfloat16)
            assert torch.equal(tensor.float(), original.bfloat16().float())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v3", {"rope_scaling": YARN}),
        ("deepseek_v3", {"q_lora_rank": None, "tie_word_embeddings": True, "n_shared_experts": 2}),
        ("kimi_k2", {"n_group": 1, "topk_group": 1}),
        ("deepseek_v2", {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}),
        (
            "deepseek_v2",
            {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "q_lora_rank": None},
        ),
    ],
)
def test_through_transformers(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = tiny_model(tiny_config(family, **changes))
    fathom.save(model, tmp_path / "ours", max_shard_bytes=200_000)
    if family == "kimi_k2":  # that name it leaves to remote code; the architecture it knows as V3's
        path = tmp_path / "ours" / "config.json"
        path.write_text(path.read_text().replace('"kimi_k2"', '"deepseek_v3"'))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokens = torch.randint(257, (2, 17))
    with torch.no_grad():
        expected, got = theirs(tokens).logits, model(tokens).logits
    assert expected.std() > 0.1
    assert (expected - got).abs().max() <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    promised = model.config.num_nextn_predict_layers
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = fathom.load(tmp_path / "theirs")
    assert [str(w.message) for w in caught if "without MTP" in str(w.message)] or not promised
    assert_equal(again, {n: t for n, t in model.state_dict().items() if ".mtp." not in n})


def test_mtp_reaches_transformers(tmp_path: Path) -> None:
    """Its MtpModel, composed over all positions, gives our MTP logits from our files."""
    transformers = pytest.importorskip("transformers")
    MtpModel = transformers.modeling_layers.MtpModel
    theirs_class = transformers.DeepseekV3ForCausalLM
    model = tiny_model(tiny_config())
    fathom.save(model, tmp_path)
    kept = theirs_class._keys_to_ignore_on_load_unexpected
    theirs_class._keys_to_ignore_on_load_unexpected = [
        r"model\.layers\.3\."
    ]  # it knows layer 61 only
    try:
        theirs = theirs_class.from_pretrained(tmp_path).eval()
        module = MtpModel.from_pretrained(theirs)
    finally:
        theirs_class._keys_to_ignore_on_load_unexpected = kept
    tokens = torch.randint(257, (1, 12))
    with torch.no_grad():
        hidden = theirs.model(tokens).last_hidden_state[:, :-1]
        positions = torch.arange(11)[None]
        state = module.forward_layer(0, hidden, positions, None, input_ids=tokens[:, 1:])
        expected = module._project_to_logits(state)
        assert (model(tokens).mtp_logits[0] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("case", ["base", "noqlora", "yarn"])
def test_golden_directory(tmp_path: Path, case: str) -> None:
    """Weights and logits recorded from `transformers`, DeepSeek's own code and a float64 forward pass."""
    data = np.load(shared_data(f"golden/tiny_v3_{case}.npz"))
    content = json.loads(bytes(data["config"]).decode())
    (tmp_path / "config.json").write_text(json.dumps(content))
    weights = {n[2:]: torch.from_numpy(data[n]) for n in data.files if n.startswith("w.")}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="without MTP"):
        model = fathom.load(tmp_path)
    with torch.no_grad():
        logits = model(torch.from_numpy(data["ref.input_ids"]).long()).logits
    assert (logits - torch.from_numpy(data["ref.logits_f64"])).abs().max() <= 1e-5


def test_single_file_with_stacked_experts_and_leftovers(tmp_path: Path) -> None:
    """A directory without index, with experts as in memory and an old rotary table, reads the same."""
    model = tiny_model(tiny_config(num_nextn_predict_layers=0))
    tensors = dict(model.state_dict()) | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    content = to_json(model.config, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert_equal(fathom.load(tmp_path), model.state_dict())
    assert from_json(content) == model.config


def test_mtp_on_request(tmp_path: Path) -> None:
    model = tiny_model(tiny_config())
    fathom.save(model, tmp_path)
    without = fathom.load(tmp_path, mtp=False)
    assert without.config.num_nextn_predict_layers == 0 and len(without.model.mtp) == 0
    assert_equal(without, {n: t for n, t in model.state_dict().items() if ".mtp." not in n})
    assert len(fathom.load(tmp_path, mtp=True).model.mtp) == 1


def test_a_diverged_copy_is_reported(tmp_path: Path) -> None:
    fathom.save(tiny_model(tiny_config()), tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.3.shared_head.head.weight"] += 1
    save_file(tensors, file)
    with pytest.warns(UserWarning, match=r"model\.layers\.3\.shared_head\.head\.weight differs"):
        fathom.load(tmp_path)


def test_shards_open_alone(tmp_path: Path) -> None:
    """Readers of others ask for the format note in each file's header."""
    fathom.save(tiny_model(tiny_config()), tmp_path, max_shard_bytes=100_000)
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
