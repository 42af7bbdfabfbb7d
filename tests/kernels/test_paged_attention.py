"""Attention over a cache in pieces equals its definition, whatever the pieces and the form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.kernels import paged_attention
from fathom.kernels.attention import absorbed_attention
from fathom.kernels.expansion import Expansion, HeadShape
from fathom.kernels.paged_attention import (
    absorb,
    expand,
    expanded_attention_behind,
    latent_attention,
    latent_attention_reference,
    padded_latent_attention,
)
from fathom.kernels.rotary import Rotation

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@given(LENGTHS, st.data())
@settings(max_examples=150, deadline=None)
def test_runs_equal_the_whole(lengths: list[int], data: st.DataObject) -> None:
    S = sum(lengths)
    T = data.draw(st.integers(1, S))
    at_once = data.draw(st.sampled_from([1, 3 * S, 1 << 24]))
    query, cache = random(T, 3, 12), random(S, 12)
    before, paged_attention.SCORES = paged_attention.SCORES, at_once
    try:
        found = latent_attention(query, cache.split(lengths))
    finally:
        paged_attention.SCORES = before
    expected = latent_attention_reference(query, cache)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_long_runs_take_the_other_order_of_products() -> None:
    query, cache = random(1, 3, 12), random(paged_attention.LONG + 5, 12)
    expected = latent_attention_reference(query, cache)
    for lengths in ([len(cache)], [paged_attention.LONG, 5], [2, len(cache) - 2]):
        found = latent_attention(query, cache.split(lengths))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_crowd_equals_each_alone() -> None:
    lengths, queries = [7, 3, 11], [2, 1, 4]
    caches = [random(S, 12) for S in lengths]
    alone = [random(T, 3, 12) for T in queries]
    query, cache = torch.zeros(3, 4, 3, 12), torch.zeros(3, 11, 12)
    seen = torch.zeros(3, 4, 11, dtype=torch.bool)
    seen[:, :, 0] = True
    for b, (S, T) in enumerate(zip(lengths, queries, strict=True)):
        query[b, :T], cache[b, :S] = alone[b], caches[b]
        for t in range(T):
            seen[b, t, : S - T + t + 1] = True
    found = padded_latent_attention(query, cache, seen)
    for b, (mine, own) in enumerate(zip(alone, caches, strict=True)):
        expected = latent_attention_reference(mine, own)
        torch.testing.assert_close(found[b, : len(mine)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [4, 8, 20])
@pytest.mark.parametrize("T", [1, 5, 13])
def test_expanded_and_absorbed_behind_a_context_agree(T: int, value: int) -> None:
    S, shape, C = 13, HeadShape(3, 8, 4, value), 10
    q_raw, entries = random(1, T, 3 * 12), random(1, S, C + 4)
    up = random(3, 8 + value, C) / 4
    angle = torch.arange(S - T, S, dtype=torch.float32)[None, :, None, None] / torch.tensor(
        [1.0, 9.0]
    )
    rotation = Rotation(angle.cos(), angle.sin())
    kv_raw = entries[..., :C] @ up.flatten(0, 1).T
    layout = Expansion(shape, rotation, 0.3)
    expanded = expanded_attention_behind(q_raw, kv_raw, entries[..., C:], layout)[0]
    q = layout.queries(q_raw)[0]
    query = torch.cat((absorb(q[..., :8], up), q[..., 8:12]), -1) * 0.3
    absorbed = expand(latent_attention(query, [entries[0]])[..., :C], up, 8)
    torch.testing.assert_close(absorbed, expanded, atol=1e-5, rtol=1e-5)
    whole = absorbed_attention(q[None, ..., :8], q[None, ..., 8:12], entries, up, 8, 0.3, None)
    torch.testing.assert_close(absorbed, whole[0], atol=1e-5, rtol=1e-5)
