"""Every fast operation equals its slow reference, values and gradients, on random shapes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom import kernels
from fathom.kernels.attention import expanded_reference
from fathom.kernels.cpu_gemm import fast_products, onednn_is_better
from fathom.kernels.cross_entropy import linear_cross_entropy_reference
from fathom.kernels.grouped import grouped_reference
from fathom.kernels.norm import rms_norm_reference
from fathom.kernels.rotary import rotate_, rotate_reference
from fathom.kernels.swiglu import swiglu_reference


def assert_same(
    fast: Callable[..., Tensor], slow: Callable[..., Tensor], *inputs: Tensor, atol: float = 1e-5
) -> None:
    """Same result and same gradients of all floating inputs."""
    outcomes = []
    for function in (fast, slow):
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
        y = function(*leaves)
        torch.manual_seed(1)
        (y * torch.randn_like(y)).sum().backward()
        outcomes.append([y.detach(), *(t.grad for t in leaves if t.requires_grad)])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 40))
def test_linear(n: int, inputs: int, outputs: int) -> None:
    x, w = torch.randn(2, n, inputs), torch.randn(outputs, inputs)
    assert_same(kernels.linear, lambda x, w: x @ w.T, x, w)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(0, 50) | st.integers(300, 500), min_size=1, max_size=6),
    st.integers(1, 5).map(lambda n: 4 * n) | st.integers(1, 20),
)
def test_grouped_linear(counts: list[int], width: int) -> None:
    """Any split of the rows, empty experts, none at all; in one call and in a loop of them."""
    x, w = torch.randn(sum(counts), 8), torch.randn(len(counts), width, 8)
    tensor = torch.tensor(counts)
    assert_same(
        lambda x, w: kernels.grouped_linear(x, w, tensor),
        lambda x, w: grouped_reference(x, w, counts),
        x,
        w,
    )


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 8), (1, 1, 4)])
@pytest.mark.parametrize("recompute", [False, True])
def test_rms_norm(shape: tuple[int, ...], recompute: bool) -> None:
    x, w = torch.randn(shape), torch.randn(shape[-1])
    assert_same(
        lambda x, w: kernels.rms_norm(x, w, 1e-5, recompute),
        lambda x, w: rms_norm_reference(x, w, 1e-5),
        x,
        w,
    )


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rotation_in_place_and_back(interleave: bool, dtype: torch.dtype) -> None:
    angles = torch.rand(2, 5, 1, 4)
    rotation = kernels.Rotation(angles.cos(), angles.sin(), interleave)
    wide = torch.randn(2, 5, 3, 13).to(dtype)
    for x in (wide[..., :8], wide[..., 5:], wide[:1, :, :, 4:12]):
        here = kernels.Rotation(angles[: len(x)].cos(), angles[: len(x)].sin(), interleave)
        expected = rotate_reference(x, here)
        with torch.no_grad():
            assert kernels.rotate(x, here).equal(kernels.rotate(x.clone(), here))
            torch.testing.assert_close(kernels.rotate(x, here), expected)
            torch.testing.assert_close(rotate_(x.clone(), here), expected)
    x = torch.randn(2, 5, 3, 8)
    assert_same(lambda x: kernels.rotate(x, rotation), lambda x: rotate_reference(x, rotation), x)
    back = rotate_reference(rotate_reference(x, rotation), rotation.back())
    torch.testing.assert_close(back, x)


def test_swiglu_together_and_apart() -> None:
    x = torch.randn(7, 24)
    assert_same(kernels.swiglu, swiglu_reference, x)
    assert_same(
        lambda x: kernels.swiglu_pair(*(half.contiguous() for half in x.chunk(2, -1))),
        swiglu_reference,
        x,
    )


def test_compiled_elementwise_functions_are_equal() -> None:
    x, w, packed = torch.randn(6, 16), torch.randn(16), torch.randn(6, 24)
    kernels.compile_elementwise(True)
    try:
        assert_same(
            lambda x, w: kernels.rms_norm(x, w, 1e-6),
            lambda x, w: rms_norm_reference(x, w, 1e-6),
            x,
            w,
        )
        assert_same(kernels.swiglu, swiglu_reference, packed)
    finally:
        kernels.compile_elementwise(False)


@pytest.mark.parametrize(("n", "vocab"), [(1, 5), (300, 17), (700, 9000)])
def test_linear_cross_entropy(n: int, vocab: int) -> None:
    """Several chunks, ignored positions, large logits, and a loss that is scaled afterwards."""
    h, w = torch.randn(n, 12), 3 * torch.randn(vocab, 12)
    targets = torch.randint(0, vocab, (n,))
    targets[::7] = kernels.IGNORE
    assert_same(
        lambda h, w: kernels.linear_cross_entropy(h, w, targets) / 3,
        lambda h, w: linear_cross_entropy_reference(h, w, targets) / 3,
        h,
        w,
        atol=1e-3,
    )


def test_cross_entropy_of_hopeless_targets_is_finite() -> None:
    h, w = torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0]])
    loss = kernels.linear_cross_entropy(h, w, torch.tensor([1]))
    assert loss.item() == pytest.approx(400.0)


def test_scatter_and_gather_rows() -> None:
    N, K, D = 9, 3, 5
    choices = torch.stack([torch.randperm(6)[:K] for _ in range(N)])
    order = choices.flatten().argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(N * K)
    token, place_NK = order // K, place.view(N, K)
    x, weights = torch.randn(N, D), torch.rand(N, K)
    assert_same(lambda x: kernels.scatter_rows(x, token, place_NK), lambda x: x[token], x)
    rows = torch.randn(N * K, D)
    assert_same(
        lambda r, w: kernels.gather_rows(r, w, token, place_NK),
        lambda r, w: (r[place_NK] * w[..., None]).sum(1),
        rows,
        weights,
    )


ATTENTION_SHAPES = [
    kernels.HeadShape(3, 8, 4, 8),
    kernels.HeadShape(2, 8, 4, 4),
    kernels.HeadShape(2, 4, 8, 2),
    kernels.HeadShape(2, 4, 4, 12),
]


def reference_from_raw(
    shape: kernels.HeadShape, layout: kernels.Expansion
) -> Callable[..., Tensor]:
    """Eqs 4-5 and 8-10 spelled out on raw projections, with torch's own gradients."""

    def attend(q_raw: Tensor, kv_raw: Tensor, k_rope: Tensor) -> Tensor:
        B, T = q_raw.shape[:2]
        q = q_raw.view(B, T, shape.heads, -1)
        pairs = torch.view_as_complex(q[..., shape.nope :].unflatten(-1, (-1, 2)).contiguous())
        turning = torch.complex(layout.rotation.cos, layout.rotation.sin)
        turned = torch.view_as_real(pairs * turning).flatten(-2)
        q = torch.cat((q[..., : shape.nope], turned), -1)
        k_nope, v = kv_raw.view(B, T, shape.heads, -1).split((shape.nope, shape.value), -1)
        k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, shape.heads, -1)), -1)
        visible = layout.visible
        mask = visible.mask
        if visible.segments is not None:
            mask = torch.zeros(B, 1, T, T, dtype=torch.bool)
            for b, row in enumerate(visible.segments):
                for lo, hi in row:
                    mask[b, :, lo:hi, lo:hi] = torch.ones(hi - lo, hi - lo).tril().bool()
        return expanded_reference(q, k, v, layout.scale, mask).flatten(2)

    return attend


@pytest.mark.parametrize(
    ("shape", "case"),
    list(itertools.product(ATTENTION_SHAPES, ["short", "rows", "long", "documents", "mask"])),
)
def test_expanded_attention(shape: kernels.HeadShape, case: str) -> None:
    B, T = {"long": (1, 1030), "rows": (5, 700)}.get(case, (3, 150))
    angles = torch.rand(1, T, 1, shape.rope // 2)
    visible = kernels.ALL
    if case == "documents":
        rows = (((0, 150),), ((0, 60), (60, 150)), ((0, 1), (1, 149), (149, 150)))
        visible = kernels.Visible(segments=rows)
    if case == "mask":
        seen = torch.rand(B, 1, T, T) < 0.5
        visible = kernels.Visible(mask=(seen.tril() | torch.eye(T, dtype=torch.bool)))
    layout = kernels.Expansion(shape, kernels.Rotation(angles.cos(), angles.sin()), 0.3, visible)
    raw = (
        torch.randn(B, T, shape.heads * shape.qk),
        torch.randn(B, T, shape.heads * (shape.nope + shape.value)),
        torch.randn(B, T, shape.rope),
    )
    assert_same(
        lambda *t: kernels.expanded_attention(*t, layout),
        reference_from_raw(shape, layout),
        *raw,
        atol=1e-4,
    )


def test_attention_of_other_devices_is_equal_too() -> None:
    """The path without a hand-written rule, plain and run again in backward, on the CPU."""
    from fathom.kernels.attention import _Again, _torch_attention

    shape = ATTENTION_SHAPES[0]
    angles = torch.rand(1, 20, 1, 2)
    visible = kernels.Visible(segments=(((0, 20),), ((0, 7), (7, 20))))
    layout = kernels.Expansion(shape, kernels.Rotation(angles.cos(), angles.sin()), 0.3, visible)
    raw = (torch.randn(2, 20, 36), torch.randn(2, 20, 48), torch.randn(2, 20, 4))
    slow = reference_from_raw(shape, layout)
    for fast in (_torch_attention, _Again.apply):
        assert_same(lambda *t, fast=fast: fast(*t, layout), slow, *raw)


def test_fast_products_are_float32() -> None:
    """Whatever library computes them, products are as exact as float32 allows."""
    a, b = torch.randn(256, 512), torch.randn(512, 128)
    with fast_products(256, a.device):
        found = a @ b
    exact = a.double() @ b.double()
    assert (found - exact).norm() / exact.norm() < 1e-6
    assert isinstance(onednn_is_better(), bool)


def test_softmax_in_place_equals_out_of_place() -> None:
    """The cross-entropy rule relies on torch.softmax writing over its own input."""
    x = torch.randn(33, 1000)
    expected = torch.softmax(x, 1)
    torch.softmax(x, 1, out=x)
    assert torch.equal(x, expected)
