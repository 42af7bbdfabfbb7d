"""The distribution tokens are drawn from, its edges, and that draws follow it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.errors import GenerationError
from fathom.inference import Sampling
from fathom.inference.choice import Draw, choose, logprobs_of, probabilities
from fathom.inference.noise import _mixed, _signed, exponential, key_of, mix
from tests.inference.chi_square import fits

LOGITS = st.lists(st.floats(-30, 30), min_size=1, max_size=12)


def chances(logits: list[float] | torch.Tensor, **wishes: Any) -> torch.Tensor:
    row = torch.as_tensor(logits, dtype=torch.float64)
    return probabilities(row[None], [Draw(Sampling(**wishes), 0, 0)])[0]


@given(LOGITS, st.floats(0.05, 5), st.floats(0.01, 1))
@settings(max_examples=200, deadline=None)
def test_nucleus_is_the_smallest_set_of_likeliest_tokens(
    logits: list[float], t: float, p: float
) -> None:
    full, cut = chances(logits, temperature=t), chances(logits, temperature=t, top_p=p)
    kept = cut > 0
    assert math.isclose(cut.sum(), 1, rel_tol=1e-9)
    assert full[kept].sum() >= p - 1e-9
    assert full[kept].sum() - full[kept].min() < p + 1e-9
    assert full[kept].min() >= full[~kept].max() - 1e-12 if (~kept).any() else True
    assert torch.allclose(cut[kept], full[kept] / full[kept].sum())


@given(LOGITS, st.floats(0.05, 5))
@settings(max_examples=100, deadline=None)
def test_temperature_divides_logits(logits: list[float], t: float) -> None:
    weights = [math.exp((x - max(logits)) / t) for x in logits]
    expected = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    assert torch.allclose(chances(logits, temperature=t), expected)


def test_top_k_and_min_p() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.06, 0.04)]
    assert torch.allclose(chances(logits, top_k=2), tensor(4 / 7, 3 / 7, 0, 0, 0))
    assert torch.allclose(chances(logits, top_k=99), tensor(0.4, 0.3, 0.2, 0.06, 0.04))
    assert torch.allclose(chances(logits, min_p=0.5), tensor(4 / 9, 3 / 9, 2 / 9, 0, 0))
    # top-p cuts what top-k has left, rescaled: 4/9 and 3/9 have 0.75 together
    assert torch.allclose(chances(logits, top_k=3, top_p=0.75), tensor(4 / 7, 3 / 7, 0, 0, 0))


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_penalties_and_bias() -> None:
    wish = Sampling(
        0.0,
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={4: 3.0},
    )
    from fathom.inference.choice import adjusted

    draw = Draw(wish, 0, 3, prompt=[0], answer=[1, 1, 2])
    found = adjusted(tensor(2.0, 2.0, -1.0, 1.0, 0.0)[None], [draw])[0]
    assert torch.allclose(found, tensor(1.0, 1.0 - 0.5 - 0.5, -2.0 - 0.5 - 0.25, 1.0, 3.0))


def test_zero_temperature_and_a_tiny_nucleus_are_greedy() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    for wish in (Sampling(0.0), Sampling(1.0, top_p=1e-9), Sampling(1e-12), Sampling(1e-300)):
        draws = [Draw(wish, seed, 0) for seed in range(50)]
        assert choose(logits, draws).tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "wish",
    [
        Sampling(0.7),
        Sampling(1.3, top_p=0.9),
        Sampling(1.0, top_k=3),
        Sampling(1.0, min_p=0.2),
        Sampling(1.0, frequency_penalty=0.7, logit_bias={5: 1.0}),
    ],
)
def test_draws_follow_the_distribution(wish: Sampling) -> None:
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -9.0])
    draw = Draw(wish, 0, 0, (), (0, 0, 1))
    expected = probabilities(logits[None], [draw])[0]
    for seeds, places in ((range(20_000), [7] * 20_000), ([3] * 20_000, range(20_000))):
        draws = [Draw(wish, s, p, (), (0, 0, 1)) for s, p in zip(seeds, places, strict=True)]
        found = torch.bincount(
            torch.tensor(choose(logits.repeat(20_000, 1), draws).tokens), minlength=6
        )
        assert fits(found, expected)


def test_a_row_is_drawn_alike_in_any_company() -> None:
    logits = torch.randn(9, 40, generator=torch.Generator().manual_seed(1))
    wishes = [Sampling(0.0), Sampling(0.9), Sampling(1.0, top_p=0.7), Sampling(1.0, top_k=4)]
    draws = [Draw(wishes[row % 4], row, row) for row in range(9)]
    together = choose(logits, draws)
    for row, draw in enumerate(draws):
        alone = choose(logits[row : row + 1], [draw])
        assert alone.tokens == together.tokens[row : row + 1]
        assert alone.gaps == pytest.approx(together.gaps[row : row + 1])


def test_the_hash_in_tensors_is_the_hash_in_integers() -> None:
    values = [0, 1, -1, 2**62, -(2**63), 123456789]
    found = _mixed(torch.tensor(values)).tolist()
    assert found == [_signed(mix(value % 2**64)) for value in values]
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # splitmix64's first number from seed 0


def test_noise_is_exponential_and_independent() -> None:
    noise = exponential([key_of(seed, 0) for seed in range(200)], 1000, torch.device("cpu"))
    assert (noise > 0).all() and noise.isfinite().all()
    assert abs(float(noise.mean()) - 1) < 0.01 and abs(float(noise.var()) - 1) < 0.05
    along, across = noise[:, 1:].flatten(), noise[1:].flatten()
    for a, b in ((along, noise[:, :-1].flatten()), (across, noise[:-1].flatten())):
        assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) < 0.01


def test_not_finite_is_an_error() -> None:
    with pytest.raises(GenerationError, match="not finite"):
        choose(torch.tensor([[0.0, float("nan")]]), [Draw(Sampling(), 0, 0)])


def test_a_vocabulary_of_one() -> None:
    assert choose(torch.zeros(2, 1), [Draw(Sampling(), 0, 0)] * 2).tokens == [0, 0]


def test_logprobs_are_the_models_own() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    first, second = logprobs_of(logits, [2, 0], [2, 0])
    assert first.rank == 2 and [token for token, _ in first.top] == [1, 2]
    assert first.logprob == pytest.approx(float(logits[0].log_softmax(-1)[2]))
    assert second.rank == 1 and second.top == ()


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"temperature": -1}, "temperature=-1 must be a number"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": True}, "temperature=True"),
        ({"top_p": 0}, "top_p=0 must be greater than 0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_k": 1.5}, "top_k=1.5 must be a whole number"),
        ({"min_p": 2}, "min_p=2"),
        ({"n": 0}, "n=0 must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"logprobs": 21}, "logprobs=21 must be at most 20"),
        ({"stop": ("",)}, "stop="),
        ({"stop": (3,)}, "stop=.* must hold texts only"),
        ({"stop_token_ids": ("a",)}, "must hold token ids only"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"seed": 1.5}, "seed=1.5 must be a whole number"),
    ],
)
def test_wishes_that_cannot_be(wish: dict[str, Any], words: str) -> None:
    with pytest.raises(GenerationError, match=words):
        Sampling(**wish)


def test_a_single_stop_is_a_list_of_one() -> None:
    assert Sampling(stop="x").stop == ("x",) and Sampling(stop_token_ids=[3, 4]).stop_token_ids == (
        3,
        4,
    )  # type: ignore[arg-type]
