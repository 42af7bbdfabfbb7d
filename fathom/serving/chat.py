"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fathom.inference.choice import Logprob
from fathom.serving.answer import Answer, said, usage_of
from fathom.serving.conversation import AUTO, Conversation, Prompt, prompt_of, sampling_of
from fathom.serving.events import EventStream, event, whole
from fathom.serving.guides import Format
from fathom.serving.reader import Piece
from fathom.serving.schemas import ChatBody, ChatMessage, NamedTool, TemplateSettings
from fathom.serving.server import Head, Server
from fathom.serving.service import Answers


def routes(server: Server) -> APIRouter:
    """The route, for a server."""
    router = APIRouter()

    @router.post("/v1/chat/completions", summary="An answer in a conversation")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        server.check_model(body.model)
        prompt = await asyncio.to_thread(prompt_of, conversation_of(body, server), server.tokenizer)
        reply = _Reply(body, prompt, server)
        if body.stream:
            return EventStream(reply.open(), reply.events, server.settings.answer_seconds)
        return await whole(request, reply.whole())

    return router


def conversation_of(body: ChatBody, server: Server) -> Conversation:
    """A body as a conversation."""
    choice = body.tool_choice or AUTO
    form = body.response_format
    schema = form.json_schema.schema_ if form and form.json_schema else None
    return Conversation(
        [message_of(message) for message in body.messages],
        [tool.function.model_dump() for tool in body.tools or ()],
        choice if isinstance(choice, str) else AUTO,
        choice.function.name if isinstance(choice, NamedTool) else None,
        body.parallel_tool_calls is not False,
        thinks(body.chat_template_kwargs, body.reasoning_effort, server.settings.thinking),
        Format(form.type, schema) if form else Format(),
    )


def message_of(message: ChatMessage) -> dict[str, Any]:
    """A message as `fathom.data.chat` takes it."""
    role = "system" if message.role == "developer" else message.role
    calls = [call.model_dump() for call in message.tool_calls or ()]
    return {"role": role, "content": message.text, "tool_calls": calls}


def thinks(template: TemplateSettings | None, effort: str | None, usual: bool) -> bool:
    """Whether a conversation thinks: what the request says in any of three ways, or the server's habit."""
    if template is not None:
        for said in (template.thinking, template.enable_thinking):
            if said is not None:
                return said
    return usual if effort is None else effort != "none"


class _Reply:
    """The reply to one request, whole or in events."""

    def __init__(self, body: ChatBody, prompt: Prompt, server: Server) -> None:
        self._body, self._prompt, self._server = body, prompt, server
        new = body.max_completion_tokens or body.max_tokens
        field = "max_tokens" if body.max_tokens else "max_completion_tokens"
        server.limits.check(prompt.ids, new, "messages", field)
        asked = (body.top_logprobs or 0) if body.logprobs else None
        vocabulary = server.engine.config.vocab_size
        self._wish = sampling_of(
            body, vocabulary, max_new_tokens=new, logprobs=asked, **prompt.sampling
        )
        self._said = [Answer(prompt.new_reader()) for _ in range(self._wish.n)]

    def open(self) -> AbstractAsyncContextManager[Answers]:
        return self._server.service.answers([self._prompt.ids], self._wish)

    async def whole(self) -> dict[str, Any]:
        async with self.open() as answers:
            async for number, delta in answers:
                self._said[number].take(delta)
            head = Head.of("chatcmpl", "chat.completion", self._body.model)
            choices = [self._choice(number, answer) for number, answer in enumerate(self._said)]
            return head.with_(choices=choices, usage=self._usage(answers))

    async def events(self, answers: Answers) -> AsyncIterator[str]:
        head = Head.of("chatcmpl", "chat.completion.chunk", self._body.model)
        options = self._body.stream_options
        usage = bool(options and (options.include_usage or options.continuous_usage_stats))
        always = bool(options and options.continuous_usage_stats)

        def chunk(*choices: dict[str, Any], last: bool = False) -> str:
            more = {"usage": self._usage(answers) if last or always else None} if usage else {}
            return event(head.with_(choices=choices, **more))

        for number in range(len(self._said)):
            yield chunk(_part(number, {"role": "assistant", "content": ""}))
        async for number, delta in answers:
            answer = self._said[number]
            for part in self._parts(number, answer.take(delta), said(delta)):
                yield chunk(part)
            if delta.ended is not None:
                yield chunk(_part(number, {}, answer.finish_reason))
        if usage:
            yield chunk(last=True)

    def _parts(
        self, number: int, pieces: list[Piece], logprobs: list[Logprob]
    ) -> list[dict[str, Any]]:
        """One step's choices; its log-probabilities go with the first."""
        deltas = [self._delta(number, pieces, place) for place in range(len(pieces))]
        if logprobs and not deltas:
            deltas = [{"content": ""}]  # the text is held back, the tokens are known
        parts = [_part(number, delta) for delta in deltas]
        if parts:
            parts[0]["logprobs"] = self._logprobs(logprobs)
        return parts

    def _delta(self, number: int, pieces: list[Piece], place: int) -> dict[str, Any]:
        piece = pieces[place]
        if piece.kind == "reasoning":
            return {"reasoning_content": piece.text}
        if piece.kind == "content":
            return {"content": piece.text}
        calls = self._said[number].calls
        later = sum(other.kind == "call" for other in pieces[place + 1 :])
        index = len(calls) - 1 - later
        function = {"arguments": piece.text}
        if piece.kind == "arguments":
            return {"tool_calls": [{"index": index, "function": function}]}
        function = {"name": piece.text, "arguments": ""}
        own = {"id": calls[index].id, "type": "function", "function": function}
        return {"tool_calls": [{"index": index, **own}]}

    def _choice(self, number: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.content if answer.content or not answer.calls else None,
            "refusal": None,
        }
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
            message["content"] = answer.content or None
        if answer.calls:
            message["tool_calls"] = [call.body for call in answer.calls]
        return {
            "index": number,
            "message": message,
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": answer.finish_reason,
        }

    def _logprobs(self, logprobs: list[Logprob]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        entries = [self._server.spelling.chat_logprob(logprob) for logprob in logprobs]
        return {"content": entries, "refusal": None}

    def _usage(self, answers: Answers) -> dict[str, Any]:
        thought = sum(answer.reader.reasoning_tokens for answer in self._said)
        return usage_of(answers.requests, thought)


def _part(number: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
