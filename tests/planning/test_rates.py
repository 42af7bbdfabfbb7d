"""The rule for products against DeepGEMM's published table, which it was not fitted to but for its best row."""

from __future__ import annotations

import pytest

from fathom.planning.cluster import DEVICES
from fathom.planning.rates import Rates, product_seconds

# rows, out, reduced, matrices, TFLOP/s: DeepGEMM's first README, H800; dense, then grouped (rows of all groups).
TABLE = [
    (4096, 2112, 7168, 1, 1058),
    (4096, 24576, 1536, 1, 990),
    (4096, 32768, 512, 1, 590),
    (4096, 7168, 16384, 1, 1358),
    (4096, 4096, 7168, 1, 1304),
    (4096, 7168, 2048, 1, 1025),
    (32768, 4096, 7168, 4, 1297),
    (32768, 7168, 2048, 4, 1099),
    (32768, 4096, 7168, 8, 1288),
    (32768, 7168, 2048, 8, 1093),
]
SHORT = [
    (64, 2112, 7168, 206),
    (64, 24576, 1536, 289),
    (64, 32768, 512, 219),
    (64, 7168, 16384, 336),
    (64, 4096, 7168, 287),
    (64, 7168, 2048, 295),
]


def _tflops(rows: int, out: int, reduced: int, matrices: int = 1) -> float:
    seconds = product_seconds(
        Rates(), DEVICES["h800"], "fp8", rows, out, reduced, matrices=matrices
    )
    return 2 * rows * out * reduced / seconds / 1e12


@pytest.mark.parametrize(("rows", "out", "reduced", "matrices", "published"), TABLE)
def test_large_products(rows: int, out: int, reduced: int, matrices: int, published: int) -> None:
    assert _tflops(rows, out, reduced, matrices) == pytest.approx(published, rel=0.20)


@pytest.mark.parametrize(("rows", "out", "reduced", "published"), SHORT)
def test_products_of_few_rows_are_bound_by_memory(
    rows: int, out: int, reduced: int, published: int
) -> None:
    assert _tflops(rows, out, reduced) == pytest.approx(published, rel=0.45)


def test_shares_are_shares() -> None:
    rates = Rates()
    for key in ("fp8", "fp8_one_scale", "bf16", "bf16_a100", "bf16_b200", "attention", "memory"):
        assert 0 < getattr(rates, key) < 1
    assert rates.product(DEVICES["a100"], "bf16") == pytest.approx(271.2e12)
    assert rates.product(DEVICES["h800"], "bf16") == pytest.approx(794.5e12)
