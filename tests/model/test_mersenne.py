"""Jumps in the Mersenne twister: against torch drawing the numbers, and against numpy's own jump where none can."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.model import mersenne
from fathom.model.mersenne import DEGREE, UNIT, WORDS, characteristic, jump, pass_over, power


def generator(drawn: int = 0) -> torch.Generator:
    found = torch.Generator().manual_seed(11)
    torch.empty(drawn).uniform_(generator=found)
    return found


def equal(a: torch.Generator, b: torch.Generator) -> bool:
    return torch.equal(a.get_state(), b.get_state())


def test_this_torch_keeps_its_state_as_we_think() -> None:
    """Otherwise all is right and slow; then `_places` is to be mended."""
    assert mersenne.knows_torch()


@settings(max_examples=15, deadline=None)
@given(
    before=st.sampled_from([0, 1, 623, 624, 625, 5000]),
    blocks=st.sampled_from([1, 2, 31, 32, 33, 400]),
    units=st.integers(1, 3),
)
def test_a_jump_is_what_drawing_leads_to(before: int, blocks: int, units: int) -> None:
    jumped, drawn = generator(before), generator(before)
    jump(jumped, units, blocks * WORDS)
    torch.empty(units * blocks * WORDS).uniform_(generator=drawn)
    assert equal(jumped, drawn)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("count", [0, 1, UNIT - 1, UNIT, 2 * UNIT + 12345])
def test_passing_over_is_drawing(known: bool, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mersenne, "knows_torch", lambda: known)
    passed, drawn = generator(100), generator(100)
    pass_over(passed, count)
    torch.empty(count).uniform_(generator=drawn)
    assert equal(passed, drawn)


def test_another_form_of_the_state_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(state: np.ndarray) -> tuple[np.ndarray, ...]:
        used_up, used, words = places(state)
        return used_up, used, words[::-1]

    places = mersenne._places
    monkeypatch.setattr(mersenne, "_places", swapped)
    assert not mersenne.knows_torch.__wrapped__()


def test_a_far_jump_equals_numpy_s() -> None:
    """numpy can jump by 2^128 words, and by nothing else. It leaves the oldest word at `pos`, going round at the end,
    and of the oldest one only the upper bit counts."""
    bits = np.random.MT19937(3)
    bits.random_raw(1)  # of the words that the seed makes the last one; now all are used up
    before, after = bits.state["state"], bits.jumped().state["state"]
    assert before["pos"] == WORDS
    theirs = np.roll(after["key"], -after["pos"])
    ours = mersenne.words_after(before["key"], power(2**128 - 1))
    assert np.array_equal(ours[1:], theirs[1:])
    assert ours[0] >> np.uint32(31) == theirs[0] >> np.uint32(31)


def test_the_polynomial_has_the_paper_s_degree_and_terms() -> None:
    assert characteristic().bit_length() - 1 == DEGREE
    assert characteristic().bit_count() == 135


def test_a_jump_as_far_as_the_report_s_model_is_large() -> None:
    """671 billion at once, or in three parts."""
    once, parts = generator(7), generator(7)
    jump(once, 65_000, UNIT)
    for units in (20_000, 20_000, 25_000):
        jump(parts, units, UNIT)
    assert equal(once, parts)
