"""Our C++ products equal torch's, for any number of rows, any widths and every kind of weight."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.kernels import few_rows, native
from fathom.kernels.native import library
from fathom.kernels.paged_attention import latent_attention_reference
from fathom.kernels.swiglu import swiglu

needs_compiler = pytest.mark.skipif(library() is None, reason="no C++ compiler")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@needs_compiler
@given(st.integers(1, 16), st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2]))
@settings(max_examples=150, deadline=None)
def test_products(rows: int, inputs: int, outputs: int, threads: int) -> None:
    x, weight = random(rows, inputs), random(outputs, inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kind in (torch.float32, torch.bfloat16):
            found = few_rows.product(x, weight.to(kind))
            expected = x.double() @ weight.to(kind).double().T
            torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_products_with_int8_weights(rows: int, groups: int) -> None:
    inputs, outputs = 64 * groups - 7, 37
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    x, scales = random(rows, inputs), random(outputs, groups).abs()
    whole = weight.double() * scales.double().repeat_interleave(64, dim=1)[:, :inputs]
    found = few_rows.product(x, weight, scales)
    torch.testing.assert_close(found.double(), x.double() @ whole.T, atol=1e-2, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "choices"), [(1, 1), (1, 4), (5, 3), (16, 2)])
def test_experts(rows: int, choices: int, kind: torch.dtype, threads: int) -> None:
    E, D, inner = 7, 40, 24
    gate_up, down = random(E, 2 * inner, D).to(kind) / 4, random(E, D, inner).to(kind) / 4
    x, weights = random(rows, D), random(rows, choices)
    indices = torch.stack([torch.randperm(E)[:choices] for _ in range(rows)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = few_rows.experts(x, gate_up, down, indices, weights)
    finally:
        torch.set_num_threads(before)
    for row in range(rows):
        expected = sum(
            weights[row, k] * (down[e].float() @ swiglu((gate_up[e].float() @ x[row])[None])[0])
            for k, e in enumerate(indices[row].tolist())
        )
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)


@needs_compiler
@pytest.mark.parametrize("gate", [-1000.0, -100.0, -88.5, -87.0, 87.0, 100.0, 1000.0])
def test_gates_far_from_zero(gate: float) -> None:
    """silu(-100) is 0: the exponential must not run out of its exponent's bits."""
    inner = 16
    gate_up = torch.cat((torch.full((1, inner, 1), gate), torch.ones(1, inner, 1)), dim=1)
    found = few_rows.experts(
        torch.ones(1, 1),
        gate_up,
        torch.ones(1, 1, inner),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.ones(1, 1),
    )
    assert float(found) == pytest.approx(inner * max(gate, 0.0), rel=1e-6, abs=1e-30)


@needs_compiler
def test_whole_numbers_need_scales_and_others_have_none() -> None:
    with pytest.raises(ValueError, match="need scales"):
        few_rows.product(torch.zeros(1, 4), torch.zeros(3, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="have no scales"):
        few_rows.product(torch.zeros(1, 4), torch.zeros(3, 4), torch.ones(3, 1))


def test_without_a_compiler_torch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATHOM_NATIVE", "0")
    assert native.library.__wrapped__() is None
    monkeypatch.delenv("FATHOM_NATIVE")
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native.library.__wrapped__() is None


def test_a_compiler_that_fails_is_told_and_gone_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.delenv("FATHOM_NATIVE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native.shutil, "which", lambda name: "/bin/false")
    with pytest.warns(UserWarning, match="could not be compiled, going on without it"):
        assert native.library.__wrapped__() is None


@needs_compiler
def test_what_it_can() -> None:
    x, weight = torch.zeros(1, 4), torch.zeros(3, 4)
    assert few_rows.can(x, weight) and few_rows.can(x, weight.bfloat16())
    assert not few_rows.can(x.double(), weight) and not few_rows.can(x, weight.double())
    assert not few_rows.can(torch.zeros(few_rows.MOST_ROWS + 1, 4), weight)
    assert not few_rows.can(x, weight.T.contiguous().T)


@needs_compiler
@given(
    st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=3), min_size=1, max_size=3),
    st.sampled_from([1, 3, 8, 16]),
    st.sampled_from([5, 16, 40]),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_attention(lengths: list[list[int]], heads: int, width: int, data: st.DataObject) -> None:
    """Texts of several runs, scattered over a cache, with some last tokens each."""
    cache = random(700, width)
    free, starts, ends, rows = 0, [], [], []
    for runs in lengths:
        for length in runs:
            starts.append(free + 2)
            free = starts[-1] + length
            ends.append(free)
        rows.append(data.draw(st.integers(1, min(sum(runs), 5))))
    texts = few_rows.Texts(
        *(torch.tensor([0, *accumulate(n)]) for n in (rows, [len(runs) for runs in lengths])),
        *(torch.tensor(places) for places in (starts, ends)),
    )
    scale = data.draw(st.sampled_from([0.1, 1.0, 30.0]))
    query = random(sum(rows), heads, width) * scale
    found = few_rows.attend(query, cache, texts)
    row = run = 0
    for count, runs in zip(rows, lengths, strict=True):
        mine = torch.cat([cache[starts[i] : ends[i]] for i in range(run, run + len(runs))])
        expected = latent_attention_reference(query[row : row + count], mine)
        torch.testing.assert_close(
            found[row : row + count], expected, atol=1e-5 * max(scale, 1), rtol=1e-4
        )
        row, run = row + count, run + len(runs)
