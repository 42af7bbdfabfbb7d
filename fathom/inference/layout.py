"""Laying a model's weights out for decoding on a CPU (see `fathom.kernels.decoding`)."""

from __future__ import annotations

import torch

from fathom.kernels.decoding import by_columns
from fathom.model import Transformer
from fathom.model.layers import Linear
from fathom.model.moe import Experts


@torch.no_grad()
def lay_out_for_decoding(model: Transformer) -> Transformer:
    """Let the weights of all products stand by columns; values, shapes and results stay what they
    are.

    For a model that speaks, not for one that trains. Without effect off the CPU or in other dtypes
    than float32. The up-projection of keys and values stays by rows, since absorption reads it by
    heads.
    """
    if model.lm_head.weight.device.type != "cpu" or model.lm_head.weight.dtype != torch.float32:
        return model
    for name, module in model.named_modules():
        if isinstance(module, Linear) and not name.endswith("kv_b_proj"):
            module.weight.data = by_columns(module.weight.data)
        elif isinstance(module, Experts):
            module.gate_up_proj.data = by_columns(module.gate_up_proj.data)
            module.down_proj.data = by_columns(module.down_proj.data)
    return model
