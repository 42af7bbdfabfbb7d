"""Serving units: weights, caches, bounds, beside the published figures (report §3.4, Day 6)."""

from __future__ import annotations

import pytest

from fathom.errors import PlanError
from fathom.planning import cache_bytes_per_token, count_parameters
from fathom.planning.cluster import DEVICES
from fathom.planning.published import V3
from fathom.planning.rates import Rates
from fathom.planning.serving import (
    CACHE_HITS,
    PUBLISHED_CONTEXT,
    PUBLISHED_DECODE,
    PUBLISHED_PREFILL,
    UNITS,
    Unit,
    cache_bytes,
    decode,
    prefill,
    unit_weights,
)

H800, RATES = DEVICES["h800"], Rates()


def test_experts_of_the_published_units() -> None:
    """9 and 1 in prefill; one in the report's decode unit; 2 in production's (spec 1.11)."""
    found = {name: unit.experts_per_device(V3) for name, unit in UNITS.items()}
    assert found == {
        "report prefill": 9,
        "report decode": 1,
        "production prefill": 9,
        "production decode": 2,
    }


def test_cache() -> None:
    """70,272 bytes a token in BF16; 656 a token and layer in FlashMLA's FP8."""
    assert cache_bytes(V3, fp8=False) == cache_bytes_per_token(V3) == 70_272
    assert cache_bytes(V3, fp8=True) / 61 == 656


def test_weights_of_a_unit_of_one() -> None:
    """One device that holds everything once holds the model."""
    whole = unit_weights(V3, Unit("one", 1, 0, ""), fp8=False)
    assert whole == pytest.approx(2 * count_parameters(V3).main, rel=1e-4)


def test_decode_is_bracketed_by_floor_and_roof() -> None:
    implied = PUBLISHED_DECODE / 21
    found = decode(
        V3, UNITS["production decode"], H800, RATES, context=PUBLISHED_CONTEXT, batch=implied
    )
    assert found.floor < PUBLISHED_DECODE < found.roof
    assert implied < found.most < 200 and found.bound == "network"
    full = decode(V3, UNITS["production decode"], H800, RATES, context=PUBLISHED_CONTEXT)
    assert full.batch == int(full.most) and full.floor > found.floor
    small = decode(
        V3, UNITS["production decode"], H800, RATES, context=PUBLISHED_CONTEXT, fp8_cache=True
    )
    assert small.most == pytest.approx(full.most * 1152 / 656)


def test_prefill_is_above_what_production_computes() -> None:
    found = prefill(V3, UNITS["production prefill"], H800, RATES, prompt=4096)
    assert PUBLISHED_PREFILL * (1 - CACHE_HITS) < found.floor < found.roof


def test_refused() -> None:
    with pytest.raises(PlanError, match="more than the 256 experts"):
        decode(V3, Unit("large", 400, 64, ""), H800, RATES, context=10)
    dense = V3.replace(first_k_dense_replace=61, num_nextn_predict_layers=0)
    with pytest.raises(PlanError, match="no experts"):
        decode(dense, UNITS["report decode"], H800, RATES, context=10)
