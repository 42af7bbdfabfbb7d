"""POST /v1/completions: texts that go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fathom.data import Tokenizer
from fathom.errors import DataError
from fathom.inference import Delta
from fathom.inference.choice import Logprob
from fathom.serving.answer import said, usage_of
from fathom.serving.conversation import sampling_of
from fathom.serving.errors import ApiError
from fathom.serving.events import EventStream, event, whole
from fathom.serving.schemas import CompletionBody
from fathom.serving.server import Head, Server
from fathom.serving.service import Answers
from fathom.serving.spelling import LEAST, Spelling

USUAL_TOKENS = 16
"""`max_tokens` of a request that does not say, as OpenAI has it."""


def routes(server: Server) -> APIRouter:
    """The route, for a server."""
    router = APIRouter()

    @router.post("/v1/completions", summary="A text that goes on")
    async def completions(body: CompletionBody, request: Request) -> Response:
        server.check_model(body.model)
        prompts = await asyncio.to_thread(prompts_of, body, server.tokenizer)
        reply = _Reply(body, prompts, server)
        if body.stream:
            return EventStream(reply.open(), reply.events, server.settings.answer_seconds)
        return await whole(request, reply.whole())

    return router


def prompts_of(body: CompletionBody, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of one or several prompts."""
    given: Any = body.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    try:
        return [tokenizer.prompt_ids(p) if isinstance(p, str) else list(p) for p in given]
    except DataError as error:
        raise ApiError(f"prompt: {error}", param="prompt") from error


class _Reply:
    """The reply to one request, whole or in events."""

    def __init__(self, body: CompletionBody, prompts: Sequence[list[int]], server: Server) -> None:
        self._body, self._prompts, self._server = body, prompts, server
        vocabulary = server.engine.config.vocab_size
        _check_ids(prompts, vocabulary)
        for prompt in prompts:
            server.limits.check(prompt, body.max_tokens, "prompt", "max_tokens")
        asked = body.logprobs
        self._wish = sampling_of(
            body,
            vocabulary,
            max_new_tokens=self._new_tokens(),
            logprobs=asked,
            prompt_logprobs=asked if body.echo else None,
        )

    def _new_tokens(self) -> int:
        if self._body.max_tokens is not None:
            return max(1, self._body.max_tokens)  # the engine always speaks; `_new` drops it for 0
        longest = max(len(prompt) for prompt in self._prompts)
        return min(USUAL_TOKENS, self._server.limits.context - longest)

    def open(self) -> AbstractAsyncContextManager[Answers]:
        return self._server.service.answers(self._prompts, self._wish)

    async def whole(self) -> dict[str, Any]:
        async with self.open() as answers:
            arrived: list[list[Delta]] = [[] for _ in answers.requests]
            async for number, delta in answers:
                arrived[number].append(delta)
            choices = [self._choice(number, deltas) for number, deltas in enumerate(arrived)]
            head = Head.of("cmpl", "text_completion", self._body.model)
            return head.with_(choices=choices, usage=usage_of(answers.requests))

    def _choice(self, number: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        parts = [self._part(number, delta, first=delta is deltas[0]) for delta in deltas]
        logprobs = [part["logprobs"] for part in parts if part["logprobs"]]
        joined = {key: [value for part in logprobs for value in part[key]] for key in _LISTS}
        return {
            "index": number,
            "text": "".join(part["text"] for part in parts),
            "logprobs": _with_offsets(joined, 0) if logprobs else None,
            "finish_reason": parts[-1]["finish_reason"],
        }

    async def events(self, answers: Answers) -> AsyncIterator[str]:
        head = Head.of("cmpl", "text_completion", self._body.model)
        options = self._body.stream_options
        usage = bool(options and (options.include_usage or options.continuous_usage_stats))
        always = bool(options and options.continuous_usage_stats)
        begun: dict[int, int] = {}
        async for number, delta in answers:
            part = self._part(number, delta, first=number not in begun)
            offset = begun.setdefault(number, 0)
            if part["logprobs"]:
                part["logprobs"] = _with_offsets(part["logprobs"], offset)
                begun[number] += sum(map(len, part["logprobs"]["tokens"]))
            now = usage_of(answers.requests) if always else None
            yield event(head.with_(choices=[part], **({"usage": now} if usage else {})))
        if usage:
            yield event(head.with_(choices=[], usage=usage_of(answers.requests)))

    def _part(self, number: int, delta: Delta, first: bool) -> dict[str, Any]:
        """What a step adds to a choice; with `echo`, the first brings the prompt."""
        text, logprobs = (delta.text, said(delta)) if self._body.max_tokens != 0 else ("", [])
        before: list[Logprob | None] = []
        if first and self._body.echo:
            request = delta.request
            text = self._server.tokenizer.decode(request.ids[: request.prompt_len]) + text
            before = list(request.prompt_logprobs) if self._body.logprobs is not None else []
        entries = None
        if self._body.logprobs is not None:
            spelling, prompt = self._server.spelling, delta.request.ids
            entries = _entries(spelling, [*before, *logprobs], prompt[0])
        reason = str(delta.ended) if delta.ended is not None else None
        if reason and self._body.max_tokens == 0:
            reason = "length"
        return {"index": number, "text": text, "logprobs": entries, "finish_reason": reason}


def _check_ids(prompts: Sequence[Sequence[int]], vocabulary: int) -> None:
    wrong = next((token for prompt in prompts for token in prompt if token >= vocabulary), None)
    if wrong is not None:
        raise ApiError(
            f"prompt: token id {wrong} is outside the vocabulary of {vocabulary}", param="prompt"
        )


_LISTS = ("tokens", "token_logprobs", "top_logprobs")


def _entries(
    spelling: Spelling, logprobs: Sequence[Logprob | None], first: int
) -> dict[str, list[Any]]:
    """OpenAI's old form of log-probabilities; None stands for the prompt's `first` token, which nothing foretells."""
    found: dict[str, list[Any]] = {key: [] for key in _LISTS}
    for logprob in logprobs:
        token = first if logprob is None else logprob.token
        top = {spelling.text(t): max(value, LEAST) for t, value in logprob.top} if logprob else None
        found["tokens"].append(spelling.text(token))
        found["token_logprobs"].append(max(logprob.logprob, LEAST) if logprob else None)
        found["top_logprobs"].append(top)
    return found


def _with_offsets(logprobs: dict[str, list[Any]], start: int) -> dict[str, list[Any]]:
    """With the place of each token's text, counted in the tokens' own texts."""
    offsets = []
    for text in logprobs["tokens"]:
        offsets.append(start)
        start += len(text)
    return {**logprobs, "text_offset": offsets}
