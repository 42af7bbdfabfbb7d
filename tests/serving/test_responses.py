"""`responses` of the official `openai` client, unmodified."""

from __future__ import annotations

from typing import Any

import openai

from tests.serving.live import NAME, Live
from tests.serving.talks import CALLS, FLAT, TALK, TWO


def test_responses(client: openai.OpenAI, live: Live) -> None:
    live.engine.say("Hello there")
    reply = client.responses.create(model=NAME, instructions="Be brief.", input="Hi")
    assert reply.output_text == "Hello there" and reply.status == "completed"
    assert reply.usage and reply.usage.output_tokens == len(live.engine.script)
    live.engine.say("I look. " + CALLS)
    reply = client.responses.create(model=NAME, input=TALK, tools=FLAT)
    kinds = [item.type for item in reply.output]
    assert kinds == ["message", "function_call", "function_call"]
    calls: list[Any] = reply.output[1:]
    assert [(call.name, call.arguments) for call in calls] == TWO
    live.engine.say("Wet.")
    outputs = [{"type": "function_call_output", "call_id": c.call_id, "output": "1"} for c in calls]
    again = client.responses.create(model=NAME, input=[*TALK, *reply.output, *outputs], tools=FLAT)
    assert again.output_text == "Wet."
    cut = client.responses.create(model=NAME, input="Hi", max_output_tokens=1)
    assert cut.status == "incomplete" and cut.incomplete_details
    assert cut.incomplete_details.reason == "max_output_tokens"


def test_responses_stream(client: openai.OpenAI, live: Live) -> None:
    live.engine.say("because</think>I look. " + CALLS)
    events = list(
        client.responses.create(
            model=NAME, input="Hi", tools=FLAT, reasoning={"effort": "low"}, stream=True
        )
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    by_kind: dict[str, list[Any]] = {}
    for event in events:
        by_kind.setdefault(event.type, []).append(event)

    def said(kind: str) -> str:
        return "".join(event.delta for event in by_kind[kind])

    assert said("response.reasoning_text.delta") == "because"
    assert said("response.output_text.delta") == "I look. "
    assert said("response.function_call_arguments.delta") == "".join(text for _, text in TWO)
    assert len(by_kind["response.output_item.done"]) == 4
    last = events[-1]
    assert last.type == "response.completed"
    assert [item.type for item in last.response.output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    with client.responses.stream(model=NAME, input="Hi") as stream:  # the client's own reading
        assert stream.get_final_response().output_text == "because</think>I look. " + CALLS
