"""What is summed in float32 is summed in float64 for a model in float64; narrower dtypes stay as they were."""

from __future__ import annotations

import torch

from fathom import kernels
from fathom.model.router import affinities, sequence_balance_loss
from tests.model.tiny import tiny_config, tiny_model


def test_dtypes() -> None:
    wide = {torch.bfloat16: torch.float32, torch.float32: torch.float32}
    for narrow, expected in (wide | {torch.float64: torch.float64}).items():
        assert kernels.wide_dtype(narrow) == expected
        assert kernels.at_least_float32(torch.ones(1, dtype=narrow)).dtype == expected
    x = torch.ones(1)
    assert kernels.at_least_float32(x) is x


def test_gradients_are_exact_in_float64() -> None:
    """Differences of 1e-6 would not show the slope of a function that is computed in float32."""
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *of: kernels.rms_norm(*of, 1e-6), (x, weight))
    head = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, 0, kernels.IGNORE, 8, 3])
    assert torch.autograd.gradcheck(
        lambda *of: kernels.linear_cross_entropy(*of, targets), (x, head)
    )
    logits = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda of: sequence_balance_loss(affinities(of, tiny_config()), 2, 0.1), (logits,)
    )


def test_a_whole_model_computes_in_float64() -> None:
    model = tiny_model().double()
    out = model(torch.arange(12)[None])
    assert out.logits.dtype == torch.float64
    assert not torch.equal(out.logits, out.logits.float().double())
