"""Reading block-FP8 directories: the golden file, ragged edges, experts, scales in another shard."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fathom
from fathom.errors import CheckpointError
from fathom.interop.fp8 import FP8, dequantize, grid
from tests.interop.tiny import tiny_config, tiny_model
from tests.shared_data import shared_data

# 576 and 192 rows are ragged over blocks of 128; 192 rows would also divide, wrongly, by two.
RAGGED = {
    "hidden_size": 192,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "num_attention_heads": 2,
    "moe_intermediate_size": 160,
    "num_hidden_layers": 2,
}


def quantize(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """Codes and scales, block by block: the plain definition."""
    codes, scales = (
        torch.zeros(weight.shape, dtype=FP8),
        torch.zeros(grid(weight.shape, (block, block))),
    )
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scales[i, j] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / scales[i, j]).to(FP8)
    return codes, scales


def definition(codes: Tensor, scales: Tensor, block: int = 128) -> Tensor:
    """Every number times the scale of the block it lies in."""
    rows, columns = (torch.arange(n) // block for n in codes.shape)
    return codes.float() * scales[rows][:, columns]


def fp8_directory(place: Path, block: int = 128) -> dict[str, Tensor]:
    """A tiny model's export with its projections quantised; returns what they must be read as (float32)."""
    fathom.save(tiny_model(tiny_config(**RAGGED)), place)
    content = json.loads((place / "config.json").read_text())
    quantization = {"quant_method": "fp8", "fmt": "e4m3"}
    if block != 128:
        quantization["weight_block_size"] = [block, block]
    (place / "config.json").write_text(json.dumps(content | {"quantization_config": quantization}))
    (file,) = place.glob("*.safetensors")
    tensors, expected, scales = load_file(file), {}, {}
    for name, tensor in list(tensors.items()):
        if "_proj" not in name or "eh_proj" in name:
            tensors[name] = tensor if "bias" in name else tensor.bfloat16()
            expected[name] = tensors[name].float()
            continue
        tensors[name], scale = quantize(tensor, block)
        scales[name + "_scale_inv"] = scale
        expected[name] = definition(tensors[name], scale, block)
    (place / "model.safetensors.index.json").unlink()
    file.unlink()
    save_file(tensors, place / "a.safetensors")
    save_file(
        scales, place / "b.safetensors"
    )  # as in the released set, a scale may lie in another shard
    return expected


def assert_reads(place: Path, expected: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    state = fathom.load(place, dtype=dtype).state_dict()
    kind = dtype or torch.bfloat16

    def check(name: str, got: Tensor) -> None:
        assert torch.equal(got.float(), expected[name].to(kind).float()), name

    check(
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        state["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"],
    )
    check("model.layers.0.self_attn.o_proj.weight", state["model.layers.0.self_attn.o_proj.weight"])
    check("model.layers.2.eh_proj.weight", state["model.mtp.0.eh_proj.weight"])
    for ours, theirs in (("model.layers.1", "model.layers.1"), ("model.mtp.0", "model.layers.2")):
        stack, down = (
            state[f"{ours}.mlp.experts.gate_up_proj"],
            state[f"{ours}.mlp.experts.down_proj"],
        )
        assert stack.dtype == kind
        for e in range(8):
            check(f"{theirs}.mlp.experts.{e}.gate_proj.weight", stack[e, :160])
            check(f"{theirs}.mlp.experts.{e}.up_proj.weight", stack[e, 160:])
            check(f"{theirs}.mlp.experts.{e}.down_proj.weight", down[e])


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("block", [128, 64])
def test_directory(tmp_path: Path, dtype: torch.dtype | None, block: int) -> None:
    expected = fp8_directory(tmp_path, block)
    assert expected["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (576, 192)
    assert_reads(tmp_path, expected, dtype)


def test_golden_block() -> None:
    data = np.load(shared_data("golden/fp8_block_quant.npz"))
    codes = torch.from_numpy(data["w_fp8_bits"]).view(FP8)
    scale = torch.from_numpy(data["w_scale"])
    assert torch.equal(dequantize(codes, scale), torch.from_numpy(data["w_dequant"]))


@pytest.mark.parametrize("shape", [(576, 130), (1, 1), (128, 128), (2, 192, 300)])
def test_ragged_edges(shape: tuple[int, ...]) -> None:
    codes = torch.randn(shape).mul(100).to(FP8)
    scale = torch.rand(grid(shape, (128, 128)))
    flat = codes.reshape(-1, *shape[-2:]), scale.reshape(-1, *scale.shape[-2:])
    expected = torch.stack([definition(c, s) for c, s in zip(*flat, strict=True)])
    assert torch.equal(dequantize(codes, scale), expected.reshape(shape))


def test_wrong_scales(tmp_path: Path) -> None:
    fp8_directory(tmp_path)
    scales = load_file(tmp_path / "b.safetensors")
    removed, cut = (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    )
    del scales[removed + "_scale_inv"]
    scales[cut + "_scale_inv"] = scales[cut + "_scale_inv"][:4].clone()
    scales["model.layers.0.input_layernorm.weight_scale_inv"] = torch.ones(1, 1)
    save_file(scales, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError) as error:
        fathom.load(tmp_path)
    assert f"{removed} is FP8 without its weight_scale_inv" in str(error.value)
    assert f"{cut} has scales [4, 2] that do not fit blocks of 128x128" in str(error.value)
    assert "1 not part of the model: model.layers.0.input_layernorm.weight_scale_inv" in str(
        error.value
    )
