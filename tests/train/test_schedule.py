"""Warm-up, constant, cosine: values at and around every mark, worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from fathom.train.schedule import learning_rate

MARKS = {"steps": 100, "lr": 2.0, "lr_end": 0.5, "warmup_steps": 10, "decay_steps": 40}


@pytest.mark.parametrize(
    ("position", "rate"),
    [
        (0, 0.0),
        (1, 0.2),
        (5, 1.0),
        (9.5, 1.9),
        (10, 2.0),
        (11, 2.0),
        (60, 2.0),  # the cosine begins
        (70, 0.5 + 0.75 * (1 + math.cos(math.pi / 4))),
        (80, 1.25),
        (100, 0.5),
    ],
)
def test_every_mark(position: float, rate: float) -> None:
    assert learning_rate(position, **MARKS) == pytest.approx(rate, rel=1e-12, abs=1e-15)


def test_it_never_jumps() -> None:
    rates = [learning_rate(n / 10, **MARKS) for n in range(1001)]
    assert max(abs(a - b) for a, b in pairwise(rates)) <= 0.0201
    assert rates.index(max(rates)) == 100 and min(rates[1:]) == pytest.approx(0.02)


def test_without_warm_up_or_cosine_it_is_constant() -> None:
    constant = {"steps": 5, "lr": 3.0, "lr_end": 0.0, "warmup_steps": 0, "decay_steps": 0}
    assert {learning_rate(n, **constant) for n in range(6)} == {3.0}


def test_warm_up_may_meet_the_cosine() -> None:
    tight = {"steps": 4, "lr": 1.0, "lr_end": 0.0, "warmup_steps": 2, "decay_steps": 2}
    rates = [learning_rate(n, **tight) for n in range(5)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])


def test_the_whole_stage_may_be_the_cosine() -> None:
    falling = {"steps": 2, "lr": 1.0, "lr_end": 0.5, "warmup_steps": 0, "decay_steps": 2}
    assert [learning_rate(n, **falling) for n in range(3)] == pytest.approx([1.0, 0.75, 0.5])
