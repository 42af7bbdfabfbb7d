"""How much of a device's peak is reached: the planner's constants, each from outside, none fitted to a training run.

A product is reckoned as its operations at the best published rate plus the bytes of its operands at the memory's
rate. That one rule stands for the dependence on shape: with DeepGEMM's best rate it gives DeepGEMM's own dense table
on an H800 within 20 % for 4,096 rows and within 45 % for 64 (`tests/planning/test_rates.py` has the table), so no rate
is looked up by shape. Everything else that a layer does moves bytes and takes their time.

The constants are upper ends: best kernels, alone on a cool chip. What a plan promises is therefore what a run gets
whose every kernel is as good as the best published one and that waits for nothing but what is reckoned here.
"""

from __future__ import annotations

from dataclasses import dataclass

from fathom.planning.cluster import Device


@dataclass(frozen=True)
class Rates:
    """Shares of peaks and what belongs to them; a what-if replaces some (`fathom.planning.what_if`)."""

    fp8: float = 1358 / 1978.9
    """FP8 products with 1x128 and 128x128 scales. DeepGEMM, first README (February 2025): 1,358 TFLOP/s on an H800, the
    best of the V3 shapes."""
    fp8_one_scale: float = 1402.6 / 1978.9
    """FP8 products with one scale for a matrix, which the tensor core applies itself. stas00/ml-engineering, Maximum
    Achievable Matmul FLOPS, H100 SXM, torch 2.7: 1,402.6 TFLOP/s."""
    bf16: float = 794.5 / 989.4
    """BF16 products on Hopper: the same table, H100 SXM 794.5 TFLOP/s."""
    bf16_a100: float = 271.2 / 312
    """The same table, A100 SXM."""
    bf16_b200: float = 1745 / 2250
    """The same book, B200 SXM."""
    fp32: float = 0.5
    """FP32 products on a CPU: our guess, as in `fathom run --dry-run`; there it is of a measured rate."""
    attention: float = 579 / 989.4
    """Attention's forward pass, share of the BF16 peak. FlashAttention-3 (arXiv 2407.08608), H100, causal, head 128,
    4K: 579 TFLOP/s."""
    attention_backward: float = 542 / 989.4
    """Its backward pass, five products for two. The same paper, figure of the backward pass, head 128, 4K: 542."""
    decode_attention: float = 660 / 989.4
    """MLA in the latent space, one token at a time. FlashMLA on an H800: 660 TFLOP/s."""
    memory: float = 3000 / 3350
    """Share of the memory's rate. FlashMLA on an H800: 3,000 GB/s."""
    inter: float = 50 * (7 / 8) / 50
    """Share of the adapter's rate in an all-to-all between nodes. DeepEP, EP64 on H800, combine: 50 GB/s counting every
    node that a token goes to; one in eight of them is its own, which costs nothing here."""
    intra: float = 153 / 160
    """Share of the usable rate inside a node. DeepEP, EP8 on H800: 153 GB/s."""
    communication_sms: int = 20
    """SMs that move tokens while others compute (report §3.2.2: 20 of 132)."""
    good_time: float = 0.97
    """Share of a long run's time that trains and is not lost again. ByteRobust (arXiv 2509.16293): 97 % over three
    months on 9,600 GPUs; Llama 3 (arXiv 2407.21783, 3.3.4): "more than 90 %" on 16,384."""
    cast: bool = True
    """Whether activations are quantised in passes of their own, through memory."""
    transpose: bool = True
    """Whether a weight gradient's operands are quantised a second time, in the other direction (report §3.3.2)."""

    def product(self, device: Device, dtype: str) -> float:
        """FLOP/s that products of a dtype reach, before the bytes they move."""
        share: float = getattr(self, dtype)
        if dtype == "bf16":
            share = {"a100": self.bf16_a100, "b200": self.bf16_b200}.get(device.name, self.bf16)
        return share * device.peak(dtype)

    def bandwidth(self, device: Device) -> float:
        """Bytes per second between memory and chip."""
        return self.memory * device.memory_bandwidth


BYTES = {"fp8": 1, "bf16": 2, "fp32": 4}
"""Bytes of one number."""
SCALE = 4 / 128
"""Bytes of FP32 scale to each FP8 number of a 1x128 tile (report §3.3.2)."""


def product_seconds(
    rates: Rates,
    device: Device,
    dtype: str,
    rows: float,
    out: float,
    reduced: float,
    *,
    matrices: float = 1,
    out_bytes: float | None = None,
) -> float:
    """Time of X[rows, reduced] W[out, reduced]^T, its rows divided among so many `matrices` W.

    `out_bytes`: of one result; by default BF16's, FP32's on a device without BF16.
    """
    if out_bytes is None:
        out_bytes = BYTES[device.compute]
    operations = 2 * rows * out * reduced
    moved = BYTES[dtype] * (rows * reduced + matrices * out * reduced) + out_bytes * rows * out
    return operations / rates.product(device, dtype) + moved / rates.bandwidth(device)
