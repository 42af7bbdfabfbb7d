"""Sampling: the distribution tokens are drawn from, and its edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.errors import GenerationError
from fathom.inference import Sampling, sample
from fathom.inference.sampling import probabilities

LOGITS = st.lists(st.floats(-30, 30), min_size=1, max_size=12)


@given(LOGITS, st.floats(0.05, 5), st.floats(0.01, 1))
@settings(max_examples=200, deadline=None)
def test_nucleus_is_the_smallest_set_of_likeliest_tokens(
    logits: list[float], t: float, p: float
) -> None:
    full = probabilities(torch.tensor([logits]), Sampling(t))[0]
    cut = probabilities(torch.tensor([logits]), Sampling(t, p))[0]
    kept = cut > 0
    assert math.isclose(cut.sum(), 1, rel_tol=1e-9)
    assert full[kept].sum() >= p - 1e-9
    assert full[kept].sum() - full[kept].min() < p + 1e-9
    assert full[kept].min() >= full[~kept].max() - 1e-12 if (~kept).any() else True
    assert torch.allclose(cut[kept], full[kept] / full[kept].sum())


@given(LOGITS, st.floats(0.05, 5))
@settings(max_examples=100, deadline=None)
def test_temperature_divides_logits(logits: list[float], t: float) -> None:
    chances = probabilities(torch.tensor([logits], dtype=torch.float64), Sampling(t))[0]
    weights = [math.exp((x - max(logits)) / t) for x in logits]
    assert torch.allclose(chances, torch.tensor(weights, dtype=torch.float64) / sum(weights))


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    sampling = Sampling(temperature=0.7, top_p=0.97, seed=0)
    expected = probabilities(logits[None], sampling)[0]
    drawn = sample(logits.repeat(20_000, 1), sampling, sampling.generator())
    found = torch.bincount(drawn, minlength=5) / 20_000
    assert found[expected == 0].sum() == 0 and (expected > 0).sum() == 3
    assert (found - expected).abs().max() < 0.015


def test_zero_temperature_and_a_tiny_nucleus_are_greedy() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    for sampling in (Sampling(0.0), Sampling(1.0, top_p=1e-9), Sampling(1e-12), Sampling(1e-300)):
        assert torch.equal(sample(logits, sampling, sampling.generator()), logits.argmax(-1))


def test_seed_decides_and_none_does_not() -> None:
    logits = torch.zeros(64, 1000)
    draw = lambda seed: sample(logits, Sampling(seed=seed), Sampling(seed=seed).generator())  # noqa: E731
    assert torch.equal(draw(5), draw(5)) and not torch.equal(draw(5), draw(6))
    assert not torch.equal(draw(None), draw(None))
    before = torch.get_rng_state()
    draw(1), draw(None)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
    ],
)
def test_values_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(GenerationError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite(bad: float) -> None:
    with pytest.raises(GenerationError, match="not finite"):
        sample(torch.tensor([[0.0, bad]]), Sampling(0.0), torch.Generator())
