"""Answers in a prescribed form: JSON, a JSON schema, the arguments of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fathom.data.chat import END_THINK
from fathom.serving.errors import ApiError


@dataclass(frozen=True)
class Format:
    """The form that the content of an answer has."""

    type: str = "text"
    """text, json_object or json_schema."""
    schema: Mapping[str, Any] | None = None


def guide_of(
    format: Format, tools: Sequence[Mapping[str, Any]], function: str | None, thinking: bool
) -> Any:
    """What masks tokens so that the answer has its form; None for plain text.

    Placeholder until branch `guide` is merged.
    """
    if format.type == "text":
        return None
    raise ApiError("response_format: not available", param="response_format")
