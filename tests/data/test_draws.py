"""Draws depend on content, seed and purpose, and are uniform; a fixed value guards against a change of the stream."""

from __future__ import annotations

import numpy as np
import pytest

from fathom.data.draws import check_rate, key_of, uniform
from fathom.errors import DataError


def test_the_stream_is_the_one_it_always_was() -> None:
    assert key_of("a document", 0) == 14157699705709679492
    expected = [0.6435779992613706, 0.3427250240666925, 0.33819996637206406]
    np.testing.assert_array_equal(uniform(1, "fim", 3), expected)


def test_key_purpose_and_seed_each_change_everything() -> None:
    assert len({key_of(text, seed) for text in ("a", "b", "") for seed in (0, 1, -1)}) == 9
    draws = [uniform(key, purpose, 50) for key in (0, 1, 2**64 - 1) for purpose in ("a", "b")]
    assert len({draw[i] for draw in draws for i in range(50)}) == 300


def test_fewer_draws_are_the_beginning_of_more() -> None:
    np.testing.assert_array_equal(uniform(7, "p", 100)[:9], uniform(7, "p", 9))
    assert len(uniform(7, "p", 0)) == 0


def test_uniform_over_keys_and_within_one() -> None:
    across = np.array([uniform(key_of(str(i), 3), "p", 1)[0] for i in range(2000)])
    for values in (across, uniform(5, "p", 2000)):
        assert values.min() >= 0 and values.max() < 1
        counts, _ = np.histogram(values, 10, (0, 1))
        assert abs(counts - 200).max() < 5 * np.sqrt(200 * 0.9)


@pytest.mark.parametrize("rate", [-0.1, 1.01, float("nan")])
def test_what_is_no_rate_is_refused_by_its_name(rate: float) -> None:
    with pytest.raises(DataError, match=rf"fim_rate={rate} is not a share; use 0"):
        check_rate("fim_rate", rate)
    check_rate("fim_rate", 0.0)
    check_rate("fim_rate", 1)
