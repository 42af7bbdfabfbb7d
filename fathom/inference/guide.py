"""The wish for an answer in a form: a JSON schema, any JSON object, a regular expression, a grammar.

How it is kept: `guided`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fathom.errors import GenerationError

Kind = Literal["json_schema", "json_object", "regex", "lark"]


@dataclass(frozen=True)
class Guide:
    """The form of an answer. Raises `GenerationError` for a value that is not of its kind.

    >>> Guide("regex", "yes|no")
    >>> Guide("json_schema", {"type": "object", "properties": {"age": {"type": "integer"}}}, after="</think>")
    """

    kind: Kind
    value: Mapping[str, Any] | str | None = None
    """The schema as a mapping or as JSON text; the expression, which is for the whole answer; the grammar in
    llguidance's form of Lark; nothing for "json_object"."""
    after: str | None = None
    """The form begins behind this text, said by the answer or already at the end of the prompt (blanks behind it
    aside); None: with the answer."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise GenerationError(
                f"guide of kind {self.kind!r} is not known; use one of {', '.join(get_args(Kind))}"
            )
        if self.after is not None and (not isinstance(self.after, str) or not self.after):
            raise GenerationError(f"guide's after={self.after!r} must be a text, or None for none")
        if self.kind == "json_schema":
            object.__setattr__(self, "value", _schema_of(self.value))
        elif self.kind == "json_object" and self.value is not None:
            raise GenerationError(
                "a guide of kind 'json_object' takes no value; use kind 'json_schema' for one"
            )
        elif self.kind in ("regex", "lark") and not (isinstance(self.value, str) and self.value):
            raise GenerationError(f"a guide of kind {self.kind!r} needs a text, not {self.value!r}")


def _schema_of(value: Any) -> Mapping[str, Any]:
    """A schema given as a mapping or as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as problem:
            raise GenerationError(f"the guide's schema is not JSON: {problem}") from problem
    if not isinstance(value, Mapping):
        raise GenerationError(f"the guide's schema is {value!r}; it must be a JSON object")
    return value
