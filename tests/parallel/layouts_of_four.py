"""The layouts of the tests of checkpoints and exports, each of a model that can be cut for all of them."""

from __future__ import annotations

from dataclasses import replace

from tests.parallel.test_layouts import Case, dp, pipe

LAYERS = 4
"""Enough for two ranks of DualPipe, which have two stages each."""


def of_four_layers(case: Case) -> Case:
    return replace(case, layers=LAYERS, micro_batch=1)


ONE = of_four_layers(Case())
EXPERTS = of_four_layers(Case(dp(4, ep=2)))
DUAL = of_four_layers(pipe("DualPipe", 2, dp=2, ep=2))
PIPE = of_four_layers(pipe("1F1B", 2))
PLAIN = of_four_layers(Case(dp(2), zero1=False))
FULL = of_four_layers(Case(dp(4, ep=2), full=True))
LAYOUTS = {
    "one": ONE,
    "dp4 ep2": EXPERTS,
    "DualPipe": DUAL,
    "1F1B": PIPE,
    "dp2 plain": PLAIN,
    "full": FULL,
}
