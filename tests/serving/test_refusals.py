"""What the official `openai` client is told when something is wrong."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.serving.live import NAME, Live
from tests.serving.talks import TALK, TOOLS


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
