"""Whether counts fit a distribution."""

from __future__ import annotations

import math

from torch import Tensor


def fits(found_V: Tensor, expected_V: Tensor) -> bool:
    """Pearson's chi-square below its 1 - 1e-5 quantile, and nothing where the probability is 0."""
    total = float(found_V.sum())
    possible = expected_V > 0
    if int(found_V[~possible].sum()):
        return False
    found, expected = found_V[possible].double(), expected_V[possible].double() * total
    big = expected >= 5
    if not bool(big.all()):  # rare outcomes are counted together
        found = pooled(found, big)
        expected = pooled(expected, big)
    freedom = len(found) - 1
    if freedom < 1:
        return True
    statistic = float(((found - expected) ** 2 / expected).sum())
    # Wilson and Hilferty: (chi2 / k) ** (1/3) is nearly normal
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return z < 4.26


def pooled(values: Tensor, big: Tensor) -> Tensor:
    import torch

    return torch.cat((values[big], values[~big].sum()[None]))
