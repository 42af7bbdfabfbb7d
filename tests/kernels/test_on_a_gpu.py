"""What takes another path on a GPU says what the CPU says. Needs CUDA: `make test-all` on such a machine."""

from __future__ import annotations

import pytest
import torch

import fathom
from fathom import kernels
from fathom.inference import generate
from fathom.kernels.grouped import grouped_reference
from tests.model.tiny import tiny_model

GPU = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 32), (60, 36)])
def test_grouped_products(inputs: int, outputs: int) -> None:
    """Widths in units of 16 bytes go to one call, others to the loop."""
    counts = [30, 0, 5, 70]
    x = torch.randn(sum(counts), inputs, device=GPU, requires_grad=True)
    weight = torch.randn(len(counts), outputs, inputs, device=GPU, requires_grad=True)
    tensor = torch.tensor(counts, device=GPU)
    found = kernels.grouped_linear(x, weight, tensor, torch.bfloat16)
    expected = grouped_reference(x, weight, counts)
    grad = torch.randn_like(expected)
    ours = torch.autograd.grad(found, (x, weight), grad.bfloat16())
    theirs = torch.autograd.grad(expected, (x, weight), grad)
    for a, b in zip((found, *ours), (expected, *theirs), strict=True):
        assert (a.float() - b).norm() / b.norm() < 1e-2


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_losses_and_gradients(recompute: bool, documents: bool) -> None:
    tokens = torch.randint(0, 101, (3, 41))
    ids = (torch.arange(41) // 15).expand(3, -1) if documents else None
    found = []
    for device in (torch.device("cpu"), GPU):
        model = tiny_model(7).to(device)
        model.set_recompute(recompute)
        marks = None if ids is None else ids.to(device)
        total = fathom.losses(model, tokens.to(device), marks).total
        total.backward()
        found.append((total.item(), {n: p.grad.cpu() for n, p in model.named_parameters()}))
    (here, ours), (there, theirs) = found
    assert abs(here - there) < 1e-4
    for name, grad in ours.items():
        assert (grad - theirs[name]).norm() <= 1e-3 * grad.norm() + 1e-6, name


def test_generation() -> None:
    model = tiny_model(8).eval()
    expected = generate(model, [1, 2, 3], 20)
    assert generate(model.to(GPU), [1, 2, 3], 20) == expected


def test_training_in_bfloat16_goes_down() -> None:
    model = tiny_model(9).to(GPU)
    model.set_compute_dtype(torch.bfloat16)
    tokens = torch.randint(0, 101, (4, 33), device=GPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    values = []
    for _ in range(20):
        loss = fathom.losses(model, tokens).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    assert values[-1] < 0.9 * values[0]
