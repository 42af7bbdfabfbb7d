"""Calls of tools, by the official `openai` client, unmodified."""

from __future__ import annotations

from typing import Any

import openai

from tests.serving.live import NAME, Live
from tests.serving.talks import CALLS, TALK, TOOLS, TWO


def test_tools(client: openai.OpenAI, live: Live) -> None:
    live.engine.say("I look. " + CALLS)
    reply = client.chat.completions.create(model=NAME, messages=TALK, tools=TOOLS)
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look. "
    calls: list[Any] = choice.message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == TWO
    assert len({call.id for call in calls}) == 2
    # What was answered can be sent back as it came, with what the tools gave.
    live.engine.say("Water.")
    results = [{"role": "tool", "tool_call_id": c.id, "content": "wet"} for c in calls]
    again = client.chat.completions.create(
        model=NAME,
        messages=[*TALK, choice.message, *results],  # type: ignore[list-item]
        tools=TOOLS,
    )
    assert again.choices[0].message.content == "Water."
    assert again.choices[0].finish_reason == "stop"


def test_tools_in_a_stream(client: openai.OpenAI, live: Live) -> None:
    live.engine.say("I look. " + CALLS)
    chunks = client.chat.completions.create(model=NAME, messages=TALK, tools=TOOLS, stream=True)
    text, calls, end = "", {}, None
    for chunk in chunks:
        choice = chunk.choices[0]
        text, end = text + (choice.delta.content or ""), choice.finish_reason or end
        for part in choice.delta.tool_calls or []:
            assert part.function
            if part.id:
                assert part.index not in calls
                calls[part.index] = [part.function.name, ""]
            calls[part.index][1] += part.function.arguments or ""
    assert text == "I look. " and end == "tool_calls"
    assert [tuple(call) for call in calls.values()] == TWO


def test_tool_choice(client: openai.OpenAI, live: Live) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": TALK, "tools": TOOLS}
    live.engine.say('{"word": "sea"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>')
    named = {"type": "function", "function": {"name": "look_up"}}
    message = client.chat.completions.create(**asked, tool_choice=named).choices[0].message  # type: ignore[arg-type]
    calls: list[Any] = message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == TWO[:1]
    live.engine.say('look_up\n```json\n{"word": "sea"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>')
    message = client.chat.completions.create(**asked, tool_choice="required").choices[0].message
    calls = message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == TWO[:1]
    live.engine.say(CALLS)
    message = client.chat.completions.create(**asked, tool_choice="none").choices[0].message
    assert message.content == CALLS and not message.tool_calls
    alone = client.chat.completions.create(**asked, parallel_tool_calls=False).choices[0]
    calls = alone.message.tool_calls or []
    assert len(calls) == 1 and alone.finish_reason == "tool_calls"
    assert (calls[0].function.name, calls[0].function.arguments) == TWO[0]
