"""`completions` and `models` of the official `openai` client, unmodified; and what is not OpenAI's: tokens."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.serving.live import NAME, Live, tokenizer
from tests.serving.talks import TALK


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


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == NAME and client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


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
    document = httpx.get(live.url + "/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]
    fields = document["components"]["schemas"]["ChatBody"]["properties"]
    assert fields["model"]["enum"] == [NAME] and fields["min_p"]["description"] == "Not OpenAI's."
