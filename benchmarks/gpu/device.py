"""What both GPU benchmarks share: the model of a recipe, timing that waits for the device, the
device's own limits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import fathom
from fathom import ModelConfig

TOY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
DATA_SHEET_BF16 = {
    "H200": 989.4e12,
    "H100 80GB HBM3": 989.4e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
}
"""Dense BF16 FLOP/s that the maker states (without sparsity)."""


def configuration(recipe: str, toy: bool) -> ModelConfig:
    """The recipe's model without MTP modules, or a toy of the same architecture."""
    if toy:
        return ModelConfig(**TOY, num_nextn_predict_layers=0)
    return fathom.load_recipe(recipe).model.replace(num_nextn_predict_layers=0)


def device_of(toy: bool) -> torch.device:
    """CUDA, or the CPU for a toy run."""
    if toy:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device; --toy runs this script on a CPU at toy size")
    return torch.device("cuda")


def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Wall seconds of each repeat, the device's work included; one more before to warm up."""
    work()
    found = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - start)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square product, best of ten."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, b), device, 10))


def copy_rate(device: torch.device, nbytes: int) -> float:
    """Bytes read and written per second by a large copy, best of ten."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / min(seconds(lambda: target.copy_(source), device, 10))


def data_sheet(device: torch.device) -> float | None:
    """The maker's figure for this device, where we know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for model, rate in DATA_SHEET_BF16.items() if model in name), None)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
