"""`chat.completions` of the official `openai` client, unmodified."""

from __future__ import annotations

import math
from typing import Any

import openai

from tests.serving.live import NAME, Live
from tests.serving.talks import TALK


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=NAME, messages=TALK, max_tokens=8, seed=3)
    (choice,) = reply.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason == "length" and reply.object == "chat.completion"
    assert reply.usage and reply.usage.completion_tokens == 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 8
    again = client.chat.completions.create(model=NAME, messages=TALK, max_tokens=8, seed=3)
    other = client.chat.completions.create(model=NAME, messages=TALK, max_tokens=8, seed=4)
    assert again.choices[0].message.content == choice.message.content
    assert other.choices[0].message.content != choice.message.content
    assert again.usage and again.usage.prompt_tokens_details
    assert again.usage.prompt_tokens_details.cached_tokens  # type: ignore[truthy-bool]


def test_chat_streams_what_it_answers(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": TALK, "max_tokens": 12, "seed": 5, "n": 2}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    texts, ends = ["", ""], ["", ""]
    for chunk in chunks[:-1]:
        assert chunk.usage is None and chunk.id == chunks[0].id
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert texts[0] != texts[1]
    last = chunks[-1]
    assert not last.choices and last.usage and whole.usage
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 24
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


def test_stop_texts(client: openai.OpenAI, live: Live) -> None:
    live.engine.say("one, two, three")
    for stop, text in [(", t", "one"), (["x", "two"], "one, "), ("four", "one, two, three")]:
        for stream in (False, True):
            asked: dict[str, Any] = {"model": NAME, "messages": TALK, "stop": stop}
            if stream:
                chunks = client.chat.completions.create(**asked, stream=True)
                choices = [chunk.choices[0] for chunk in chunks]
                assert "".join(choice.delta.content or "" for choice in choices) == text
                assert choices[-1].finish_reason == "stop"
            else:
                choice = client.chat.completions.create(**asked).choices[0]
                assert (choice.message.content, choice.finish_reason) == (text, "stop")


def test_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": TALK, "max_tokens": 6, "temperature": 0}
    reply = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    choice = reply.choices[0]
    assert choice.logprobs and choice.logprobs.content and len(choice.logprobs.content) == 6
    for entry in choice.logprobs.content:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert (
            math.isclose(entry.logprob, values[0]) and entry.logprob < 0
        )  # greedy takes the first
    data = bytes(byte for entry in choice.logprobs.content for byte in entry.bytes or [])
    assert data.decode(errors="replace") == choice.message.content
    chunks = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True)
    streamed = [
        entry
        for chunk in chunks
        if (logprobs := chunk.choices[0].logprobs)
        for entry in logprobs.content or []
    ]
    assert [entry.token for entry in streamed] == [e.token for e in choice.logprobs.content]


def test_reasoning(client: openai.OpenAI, live: Live) -> None:
    live.engine.say("because</think>\n\nso")
    asked: dict[str, Any] = {"model": NAME, "messages": TALK}
    thinking = {"chat_template_kwargs": {"thinking": True}}
    for more in ({"extra_body": thinking}, {"reasoning_effort": "low"}):
        message = client.chat.completions.create(**asked, **more).choices[0].message  # type: ignore[arg-type]
        assert message.content == "so" and message.model_extra
        assert message.model_extra["reasoning_content"] == "because"
    chunks = client.chat.completions.create(**asked, extra_body=thinking, stream=True)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "so"
    thoughts = [(delta.model_extra or {}).get("reasoning_content", "") for delta in deltas]
    assert "".join(thoughts) == "because"
    plain = client.chat.completions.create(**asked).choices[0].message
    assert plain.content == "because</think>\n\nso"
    live.engine.say("never ending")
    reply = client.chat.completions.create(**asked, reasoning_effort="high")
    message = reply.choices[0].message
    assert (
        message.content is None
        and (message.model_extra or {})["reasoning_content"] == "never ending"
    )
    assert reply.usage and reply.usage.completion_tokens_details
    assert reply.usage.completion_tokens_details.reasoning_tokens == reply.usage.completion_tokens


def test_harmless_fields_are_taken(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "Hi", "name": "Ann"}],
        max_tokens=1,
        user="u",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        modalities=["text"],
    )
    assert reply.choices[0].finish_reason
