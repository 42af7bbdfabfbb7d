"""The remedy for a mistyped name."""

from __future__ import annotations

from fathom.errors import did_you_mean


def test_the_nearest_name_or_all_of_them() -> None:
    known = ["pretrain", "anneal", "extend-32k"]
    assert did_you_mean("extend32k", known) == "did you mean 'extend-32k'?"
    assert did_you_mean("sft", known) == "known are pretrain, anneal, extend-32k"
    assert did_you_mean("sft", iter(known), "there are").startswith("there are pretrain")
