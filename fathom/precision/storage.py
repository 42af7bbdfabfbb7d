"""Weights stored in fewer bits for speaking; products and sums stay float32.

Decoding a token reads every active weight once, and reading is what it waits for. Stored as bfloat16
the weights are half as many bytes, as int8 with a scale for every 64 inputs a quarter and a little:

    s = max |w| / 127 over the 64,     q = round(w / s),     w ~ s q

`kernels.few_rows` reads such weights as they are. For more rows than it takes (prompts) a matrix is
widened before its product, which many rows make up for. Not touched, because they decide much and
take little: embeddings, norms, routers, and kv_b_proj, which absorbed attention reads by heads.

Shapes: O out, I in, G groups of inputs, E experts, N rows.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fathom import kernels
from fathom.errors import ConfigError
from fathom.kernels.few_rows import GROUP
from fathom.kernels.native import library
from fathom.model import Transformer
from fathom.model.layers import Linear
from fathom.model.moe import Experts

Storage = Literal["float32", "bfloat16", "int8"]


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 of the shape [..., O, I] and float32 scales [..., O, G]; the last group may be shorter."""
    inputs = weight.shape[-1]
    groups = -(-inputs // GROUP)
    padded = nn.functional.pad(weight.float(), (0, groups * GROUP - inputs))
    grouped = padded.unflatten(-1, (groups, GROUP))
    scales = grouped.abs().amax(-1) / 127
    whole = (grouped / scales.clamp_min(1e-30)[..., None]).round().clamp(-127, 127)
    return whole.to(torch.int8).flatten(-2)[..., :inputs].contiguous(), scales.contiguous()


def widened(whole: Tensor, scales: Tensor) -> Tensor:
    """The float32 weights that int8 and scales stand for."""
    wide = scales.repeat_interleave(GROUP, dim=-1)[..., : whole.shape[-1]]
    return whole.to(torch.float32).mul_(wide)


class _Int8Linear:
    """`Linear.matmul` on stored weights."""

    def __init__(self, scales_OG: Tensor) -> None:
        self.scales_OG = scales_OG

    def __call__(self, x: Tensor, weight_OI: Tensor, dtype: torch.dtype | None) -> Tensor:
        if kernels.few_rows.can(x, weight_OI):
            return kernels.few_rows.product(x, weight_OI, self.scales_OG)
        return kernels.linear(x, widened(weight_OI, self.scales_OG), dtype)


class _Int8Experts:
    """`Experts.matmul` on stored weights; scales of both matrices, told apart by which one comes."""

    def __init__(self, experts: Experts, scales: tuple[Tensor, Tensor]) -> None:
        self.first, self.scales = experts.gate_up_proj, scales

    def __call__(
        self, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor, dtype: torch.dtype | None
    ) -> Tensor:
        scales = self.scales[0 if weight_EOI is self.first else 1]
        return kernels.grouped_linear(x_NI, widened(weight_EOI, scales), counts_E, dtype)


PRODUCTS = (_Int8Linear, _Int8Experts)
"""What stands in `matmul` of stored modules."""


@torch.no_grad()
def store_weights(model: Transformer, storage: Storage | str) -> Transformer:
    """Store the weights of a float32 model on a CPU otherwise, in place and for good; the model.

    Raises `ConfigError` for a storage that is not known or a model that is elsewhere.
    """
    if storage not in ("float32", "bfloat16", "int8"):
        raise ConfigError(f"weights={storage!r} is not known; use float32, bfloat16 or int8")
    weight = model.lm_head.weight
    if storage == "float32":
        return model
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise ConfigError(
            f"weights={storage!r} is for float32 models on a CPU, this is {weight.dtype} on {weight.device}"
        )
    if library() is None:
        raise ConfigError(
            f"weights={storage!r} are read by our C++, and no C++ compiler is found; install one, or use float32"
        )
    for name, module in model.named_modules():
        if isinstance(module, Linear) and not name.endswith("kv_b_proj"):
            _store_linear(module, storage)
        elif isinstance(module, Experts):
            _store_experts(module, storage)
    model.set_compute_dtype(torch.float32)
    return model


def _store_linear(module: Linear, storage: str) -> None:
    if storage == "bfloat16":
        module.weight = _fixed(module.weight.bfloat16())
        return
    whole, module.scales = rounded(module.weight)
    module.weight = _fixed(whole)
    module.matmul = _Int8Linear(module.scales)


def _store_experts(module: Experts, storage: str) -> None:
    if storage == "bfloat16":
        module.gate_up_proj = _fixed(module.gate_up_proj.bfloat16())
        module.down_proj = _fixed(module.down_proj.bfloat16())
        return
    (first, first_scales), (second, second_scales) = (
        rounded(module.gate_up_proj),
        rounded(module.down_proj),
    )
    module.gate_up_proj, module.down_proj = _fixed(first), _fixed(second)
    module.scales = (first_scales, second_scales)
    module.matmul = _Int8Experts(module, module.scales)


def _fixed(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
