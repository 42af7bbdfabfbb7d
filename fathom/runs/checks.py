"""Checks that the tables of a recipe share; each raises `RecipeError` with key, value, constraint and remedy."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from fathom.errors import RecipeError


def check_weights(path: str, weights: dict[str, Any]) -> None:
    """Shares of sources: numbers, none negative, not all 0."""
    for name, weight in weights.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number and 0 <= weight < math.inf):
            raise RecipeError(f"{path}.{name} = {weight!r} must be a number, not negative")
    if weights and not sum(weights.values()):
        raise RecipeError(f"{path} = {weights} gives every source nothing; raise one of them")


def check_choice(path: str, value: str, allowed: tuple[str, ...]) -> None:
    """One of a few words."""
    if value not in allowed:
        raise RecipeError(f"{path} = {value!r} must be one of {', '.join(allowed)}; choose one")


def check_positive(table: Any, path: str, keys: tuple[str, ...] | None = None) -> None:
    """Counts must be at least 1: the named ones where they are given, or every whole number of the table."""
    for key in keys or tuple(one.name for one in fields(table)):
        value = getattr(table, key)
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise RecipeError(f"{path}.{key} = {value} must be at least 1; raise it")
