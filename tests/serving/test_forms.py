"""Answers in a form, asked for by the official client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.serving.live import NAME, Live, tokenizer

pytest.importorskip("llguidance", reason="answers in a form need fathom[guide]")

TALK: list[Any] = [{"role": "user", "content": "Hi"}]
# A random model likes blanks, which every form allows between its parts.
WITHOUT_BLANKS = {
    str(token): -100
    for token in range(tokenizer().vocab_size)
    if not tokenizer().decode([token]).strip()
}


class Word(BaseModel):
    text: str
    count: int
    kind: bool


SCHEMA = Word.model_json_schema() | {"additionalProperties": False}
SHORT = {
    **SCHEMA,
    "properties": {
        **SCHEMA["properties"],
        "text": {"enum": ["sea", "sand"]},
        "count": {"enum": [1, 2]},
    },
}
FORM: Any = {
    "type": "json_schema",
    "json_schema": {"name": "word", "strict": True, "schema": SHORT},
}


@pytest.mark.parametrize("seed", range(3))
def test_a_schema_is_kept(client: openai.OpenAI, seed: int) -> None:
    reply = client.chat.completions.create(
        model=NAME,
        messages=TALK,
        response_format=FORM,
        seed=seed,
        max_tokens=100,
        logit_bias=WITHOUT_BLANKS,
    )
    choice = reply.choices[0]
    assert choice.finish_reason == "stop"
    word = Word.model_validate_json(choice.message.content or "")
    assert word.text in ("sea", "sand") and word.count in (1, 2)


def test_the_clients_own_reading_of_a_schema(client: openai.OpenAI) -> None:
    class Yes(BaseModel):
        yes: bool

    reply = client.chat.completions.parse(
        model=NAME, messages=TALK, response_format=Yes, max_tokens=300
    )
    assert isinstance(reply.choices[0].message.parsed, Yes)
    answer = client.responses.parse(model=NAME, input="Hi", text_format=Yes, max_output_tokens=300)
    assert isinstance(answer.output_parsed, Yes)


def test_a_form_begins_behind_the_reasoning(client: openai.OpenAI, live: Live) -> None:
    words = live.engine.tokenizer
    assert words is not None
    live.engine.script = words.encode("let me see, {not yet}</think>")
    message = (
        client.chat.completions.create(
            model=NAME, messages=TALK, response_format=FORM, reasoning_effort="low", max_tokens=200
        )
        .choices[0]
        .message
    )
    assert (message.model_extra or {})["reasoning_content"] == "let me see, {not yet}"
    Word.model_validate_json(message.content or "")


def test_strict_calls_follow_their_schema(client: openai.OpenAI) -> None:
    tools: list[Any] = [
        {"type": "function", "function": {"name": name, "parameters": SHORT, "strict": True}}
        for name in ("look_up", "add")
    ]
    named: Any = {"type": "function", "function": {"name": "add"}}
    for choice, names in [("required", ("look_up", "add")), (named, ("add",))]:
        for seed in range(3):
            reply = client.chat.completions.create(
                model=NAME,
                messages=TALK,
                tools=tools,
                tool_choice=choice,
                seed=seed,
                max_tokens=150,
                logit_bias=WITHOUT_BLANKS,
            ).choices[0]
            (call,) = reply.message.tool_calls or []
            assert reply.finish_reason == "tool_calls" and call.type == "function"
            assert call.function.name in names
            Word.model_validate_json(call.function.arguments)


def test_forms_that_cannot_be(client: openai.OpenAI) -> None:
    wrong: Any = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "nothing"}},
    }
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=NAME, messages=TALK, response_format=wrong)
    assert refused.value.param == "response_format"
    tool: Any = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model=NAME, messages=TALK, response_format=FORM, tools=[tool]
        )
    assert refused.value.param == "response_format"


def test_any_object(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_object"}
    for seed in range(20):
        choice = client.chat.completions.create(
            model=NAME,
            messages=TALK,
            response_format=form,
            seed=seed,
            max_tokens=100,
            logit_bias=WITHOUT_BLANKS,
        ).choices[0]
        assert (choice.message.content or "").lstrip().startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content or ""), dict)
            return
    pytest.fail("no object was ever complete")


def test_a_form_that_is_left_is_told(client: openai.OpenAI, live: Live) -> None:
    """The masks do not let it happen; should it happen all the same, the client is not given what is no form."""
    live.engine.say("no form at all")
    asked: dict[str, Any] = {"model": NAME, "messages": TALK, "response_format": FORM}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked)
    assert refused.value.param == "response_format"
    with pytest.raises(openai.APIError, match="cannot go on in this form"):
        list(client.chat.completions.create(**asked, stream=True))
