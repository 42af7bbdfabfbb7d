"""From TOML tables to frozen dataclasses and back, strictly: every key known, every value of its type.

Errors name the key as it is written in the recipe, its value, what it must be, and what to do.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from fathom.errors import RecipeError, did_you_mean

T = TypeVar("T")
_BARE_KEY = re.compile("[A-Za-z0-9_-]+")


def build(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """`cls` from a table. Raises `RecipeError` for unknown, missing or mistyped keys."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in table.items():
        if key not in fields:
            raise RecipeError(unknown(f"{where}.{key}" if where else key, key, fields))
        values[key] = _typed(value, hints[key], f"{where}.{key}" if where else key)
    for name, field in fields.items():
        needed = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if needed and name not in values:
            raise RecipeError(f"{where or 'the recipe'} has no {name!r}; add it")
    return cls(**values)


def unknown(path: str, key: str, known: Iterable[str]) -> str:
    """The message for a key that does not exist, with the nearest one that does."""
    return f"{path} is not a key of a recipe; {did_you_mean(key, sorted(known))}"


def _typed(value: Any, hint: Any, path: str) -> Any:
    """`value` as the annotated type, integers accepted where numbers are asked for."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        options = [option for option in hint.__args__ if option is not type(None)]
        return _typed(value, options[0], path)
    origin = typing.get_origin(hint)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise RecipeError(_mistyped(path, value, f"a list of {_name(item)}"))
        return tuple(_typed(one, item, f"{path}[{i}]") for i, one in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise RecipeError(_mistyped(path, value, "a table"))
        return dict(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 5e12 tokens
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(_mistyped(path, value, "a finite number"))
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise RecipeError(_mistyped(path, value, _name(hint)))
    return value


def _mistyped(path: str, value: Any, wanted: str) -> str:
    return f"{path} = {value!r} must be {wanted}; correct it in the recipe or with --set"


def _name(kind: type) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def parse_value(text: str) -> Any:
    """The right side of `--set key=value`: a TOML value, or the bare text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def to_toml(content: Mapping[str, Any]) -> str:
    """A recipe's nested dict as TOML: plain keys, then tables, then arrays of tables."""
    lines, later = [], []
    for key, value in content.items():
        if value is None:
            continue
        if isinstance(value, Mapping):
            later.append(f"\n[{key}]\n{_pairs(value)}")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            later += [f"\n[[{key}]]\n{_pairs(item)}" for item in value]
        else:
            lines.append(f"{key} = {literal(value)}")
    return "\n".join(lines + later) + "\n"


def _pairs(table: Mapping[str, Any]) -> str:
    return "\n".join(_entries(table))


def _entries(table: Mapping[str, Any]) -> list[str]:
    """`key = value` of all that is not None; a key with a dot in it (the name of a source) is one key all the same."""
    named = {k if _BARE_KEY.fullmatch(k) else literal(k): v for k, v in table.items()}
    return [f"{k} = {literal(v)}" for k, v in named.items() if v is not None]


def literal(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{ " + ", ".join(_entries(value)) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(literal(item) for item in value) + "]"
    return repr(value)


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted path, stages by their names; for comparing two recipes."""
    found: dict[str, Any] = {}
    if isinstance(content, Mapping):
        for key, value in content.items():
            found |= flatten(value, f"{prefix}.{key}" if prefix else key)
    elif isinstance(content, list | tuple) and content and isinstance(content[0], Mapping):
        found[f"order of {prefix}"] = [item.get("name") for item in content]
        for number, item in enumerate(content):
            found |= flatten(item, f"{prefix}.{item.get('name', number)}")
    else:
        found[prefix] = list(content) if isinstance(content, tuple) else content
    return found


def differences(old: Any, new: Any) -> list[str]:
    """`key: old → new` for every leaf in which two recipes differ."""
    a, b = flatten(old), flatten(new)
    keys = [key for key in (*a, *(k for k in b if k not in a)) if a.get(key) != b.get(key)]
    return [f"{key}: {a.get(key)!r} → {b.get(key)!r}" for key in keys]
