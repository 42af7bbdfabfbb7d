"""Measuring a finished model (report §4.3, §4.4): so far, finding a needle in a haystack."""

from __future__ import annotations

from fathom.evaluation.haystack import Form, Haystack, Pairs, PassKey, Puzzle
from fathom.evaluation.needle import Grid, even_depths, needle_grid

__all__ = [
    "Form",
    "Grid",
    "Haystack",
    "Pairs",
    "PassKey",
    "Puzzle",
    "even_depths",
    "needle_grid",
]
