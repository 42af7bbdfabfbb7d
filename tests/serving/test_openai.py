"""The official `openai` client's calls, unmodified."""

from __future__ import annotations

import json
import math
from typing import Any

import openai
import pytest

from tests.serving.live import NAME, Live, tokenizer
from tests.serving.test_reader import CALLS, TWO

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


def test_completions(client: openai.OpenAI) -> None:
    on: dict[str, Any] = {"extra_body": {"ignore_eos": True}, "seed": 1}
    reply = client.completions.create(model=NAME, prompt="def greet", **on)
    assert reply.usage and reply.usage.completion_tokens == 16 and reply.object == "text_completion"
    prompts = [tokenizer().encode(text) for text in ("def greet", "def")]
    several = client.completions.create(model=NAME, prompt=prompts, n=2, **on)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == reply.choices[0].text != several.choices[1].text
    assert several.usage and several.usage.completion_tokens == 64
    assert several.usage.prompt_tokens == sum(map(len, prompts))
    stream = client.completions.create(model=NAME, prompt="def greet", stream=True, **on)
    assert "".join(chunk.choices[0].text for chunk in stream) == reply.choices[0].text


def test_echo_scores_a_prompt(client: openai.OpenAI) -> None:
    """What evaluation tools ask: the prompt's own log-probabilities, and nothing new."""
    text = "def greet(name):"
    ids = tokenizer().encode(text)
    scored = client.completions.create(
        model=NAME, prompt=text, echo=True, max_tokens=0, logprobs=1
    ).choices[0]
    assert scored.text == text and scored.logprobs and scored.logprobs.token_logprobs
    assert len(scored.logprobs.tokens or []) == len(ids)
    assert scored.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in scored.logprobs.token_logprobs[1:])
    assert "".join(scored.logprobs.tokens or []) == text
    more = client.completions.create(
        model=NAME, prompt=text, echo=True, max_tokens=3, logprobs=1, temperature=0
    ).choices[0]
    assert more.text.startswith(text) and more.logprobs and more.logprobs.token_logprobs
    assert len(more.logprobs.token_logprobs) == len(ids) + 3
    assert more.logprobs.token_logprobs[1 : len(ids)] == pytest.approx(
        scored.logprobs.token_logprobs[1:], abs=1e-4
    )


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


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == NAME and client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 50}, "top_logprobs"),
        ({"seed": 2**70}, "seed"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": "x " * 1500}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools.0.function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "reasoning_effort": "low"}, "tool_choice"),
        ({"tools": TOOLS * 2}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"extra_body": {"top_q": 1}}, "top_q"),
        ({"extra_body": {"stream_options": {"colour": 1}}}, "stream_options.colour"),
    ],
)  # fmt: skip
def test_errors_name_the_field(client: openai.OpenAI, wrong: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": NAME, "messages": TALK, **wrong})
    error = caught.value
    assert error.param == param and error.type == "invalid_request_error"
    assert param.split(".")[-1] in error.message


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


def test_errors_are_of_the_clients_kinds(client: openai.OpenAI, live: Live) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=TALK)
    assert caught.value.param == "model" and caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=NAME, prompt=[[999_999]])
    assert refused.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=NAME, input="Hi", previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"
    live.engine.failing = ValueError("a fault of ours")
    with pytest.raises(openai.InternalServerError) as failed:
        client.chat.completions.create(model=NAME, messages=TALK, max_tokens=2)
    assert "fault of ours" not in failed.value.message
    assert client.chat.completions.create(model=NAME, messages=TALK, max_tokens=2).choices


def test_a_failure_in_a_stream_is_told(client: openai.OpenAI, live: Live) -> None:
    live.engine.pause = 0.01
    chunks = client.chat.completions.create(
        model=NAME, messages=TALK, stream=True, max_tokens=50, extra_body={"ignore_eos": True}
    )
    assert next(chunks).choices
    live.engine.failing = ValueError("a fault of ours")
    with pytest.raises(openai.APIError, match="the engine failed"):
        list(chunks)


def test_tokens(live: Live) -> None:
    ids = live.post("/tokenize", prompt="def greet").json()
    assert ids["tokens"] == tokenizer().encode("def greet") and ids["count"] == len(ids["tokens"])
    assert live.post("/detokenize", tokens=ids["tokens"]).json() == {"prompt": "def greet"}
    talk = live.post("/tokenize", messages=TALK, return_token_strs=True).json()
    text = "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>"
    assert "".join(talk["token_strs"]) == text
    assert live.post("/detokenize", tokens=talk["tokens"]).json() == {"prompt": text}
    for body, param in [({}, "prompt"), ({"prompt": "a", "messages": TALK}, "prompt")]:
        refused = live.post("/tokenize", **body)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param
    assert live.post("/detokenize", tokens=[10**6]).json()["error"]["param"] == "tokens"


def test_the_document_of_the_interface(live: Live) -> None:
    import httpx

    document = httpx.get(live.url + "/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]
    assert json.dumps(document)
