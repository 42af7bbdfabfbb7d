"""Answers in a prescribed form: JSON, a JSON schema, the arguments of a call that is forced."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fathom.data.chat import ARGUMENTS_CLOSE, ARGUMENTS_OPEN, END_THINK
from fathom.inference.guide import Guide

ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Format:
    """The form that the content of an answer has."""

    type: str = "text"
    """text, json_object or json_schema."""
    schema: Mapping[str, Any] | None = None


def guide_of(form: Format, thinking: bool) -> Guide | None:
    """What lets only tokens through that the form allows, behind the reasoning if there is some; None for text."""
    after = END_THINK if thinking else None
    if form.type == "text":
        return None
    if form.type == "json_object":
        return Guide("json_object", after=after)
    return Guide("json_schema", form.schema or ANY_OBJECT, after=after)


def guide_of_call(tools: Sequence[Mapping[str, Any]], function: str | None) -> Guide | None:
    """The same for a call that is forced, if the functions it may go to are strict; the answer is one call then.

    With a `function` its name is in the prompt and the answer is its arguments; without, the answer begins with a name.
    """
    possible = [tool for tool in tools if function in (None, tool["name"])]
    if not all(tool.get("strict") for tool in possible):
        return None
    if function is not None:
        return Guide("json_schema", possible[0].get("parameters") or ANY_OBJECT)
    rules = [f"start: {' | '.join(f'call{n}' for n in range(len(possible)))}"]
    for number, tool in enumerate(possible):
        begin, close = json.dumps(tool["name"] + ARGUMENTS_OPEN), json.dumps(ARGUMENTS_CLOSE)
        rules.append(f"call{number}: {begin} arguments{number} {close}")
        schema = json.dumps(tool.get("parameters") or ANY_OBJECT)
        rules.append(f"arguments{number}: %json {schema}")
    return Guide("lark", "\n".join(rules))
