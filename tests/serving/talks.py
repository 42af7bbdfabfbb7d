"""Conversations and tools that the tests of the API send, and calls as a model says them."""

from __future__ import annotations

from typing import Any

TALK: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Something.",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
        },
    }
    for name in ("look_up", "add")
]
FLAT: list[Any] = [{"type": "function", **tool["function"], "strict": False} for tool in TOOLS]
CALLS = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    'look_up\n```json\n{"word": "sea"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>'
    'add\n```json\n{"a": [1, 2],\n "b": "```"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
TWO = [("look_up", '{"word": "sea"}'), ("add", '{"a": [1, 2],\n "b": "```"}')]
