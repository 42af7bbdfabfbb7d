"""POST /v1/responses: a conversation in items. Nothing is kept between requests."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fathom.errors import FathomError
from fathom.inference import Ended, Sampling
from fathom.inference.choice import Logprob
from fathom.serving.answer import Answer, said, usage_of
from fathom.serving.chat import thinks
from fathom.serving.conversation import AUTO, Conversation, Prompt, prompt_of
from fathom.serving.errors import error_body, translated
from fathom.serving.events import EventStream, event, whole
from fathom.serving.guides import Format
from fathom.serving.items import Items
from fathom.serving.reader import Piece
from fathom.serving.response_schemas import (
    CallItem,
    FlatNamedTool,
    Item,
    MessageItem,
    OutputItem,
    Part,
    ResponsesBody,
)
from fathom.serving.server import Server
from fathom.serving.service import Answers


def routes(server: Server) -> APIRouter:
    """The route, for a server."""
    router = APIRouter()

    @router.post("/v1/responses", summary="An answer to items")
    async def responses(body: ResponsesBody, request: Request) -> Response:
        server.check_model(body.model)
        prompt = await asyncio.to_thread(prompt_of, conversation_of(body, server), server.tokenizer)
        reply = _Reply(body, prompt, server)
        if body.stream:
            seconds = server.settings.answer_seconds
            return EventStream(reply.open(), reply.events, seconds, last="")
        return await whole(request, reply.whole())

    return router


def conversation_of(body: ResponsesBody, server: Server) -> Conversation:
    """A body as a conversation."""
    choice = body.tool_choice or AUTO
    form = body.text.format if body.text else None
    effort = body.reasoning.effort if body.reasoning else None
    return Conversation(
        _messages(body),
        [tool.model_dump() for tool in body.tools or ()],
        choice if isinstance(choice, str) else AUTO,
        choice.name if isinstance(choice, FlatNamedTool) else None,
        body.parallel_tool_calls is not False,
        thinks(body.chat_template_kwargs, effort, server.settings.thinking),
        Format(form.type, form.schema_) if form else Format(),
    )


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    """Items as messages: calls join the assistant's message before them."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for item in body.input:
        _append(messages, item)
    return messages or [{"role": "user", "content": ""}]


def _append(messages: list[dict[str, Any]], item: Item) -> None:
    if isinstance(item, MessageItem):
        role = "system" if item.role == "developer" else item.role
        messages.append({"role": role, "content": _text(item.content)})
    elif isinstance(item, OutputItem):
        messages.append({"role": "tool", "content": _text(item.output)})
    elif isinstance(item, CallItem):
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        call = {"function": {"name": item.name, "arguments": item.arguments}}
        messages[-1].setdefault("tool_calls", []).append(call)


def _text(content: str | Sequence[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class _Reply:
    """The reply to one request, whole or in events."""

    def __init__(self, body: ResponsesBody, prompt: Prompt, server: Server) -> None:
        self._body, self._prompt, self._server = body, prompt, server
        server.limits.check(prompt.ids, body.max_output_tokens, "input", "max_output_tokens")
        logprobs = body.top_logprobs
        if logprobs is None and body.include:
            logprobs = 0
        self._wish = Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            max_new_tokens=body.max_output_tokens,
            logprobs=logprobs,
            **prompt.sampling,
        )
        self._answer = Answer(prompt.new_reader())
        self._id, self._created = f"resp_{secrets.token_hex(16)}", int(time.time())
        self._items = Items()

    def open(self) -> AbstractAsyncContextManager[Answers]:
        return self._server.service.answers([self._prompt.ids], self._wish)

    async def whole(self) -> dict[str, Any]:
        async with self.open() as answers:
            async for _, delta in answers:
                for piece in self._answer.take(delta):
                    self._items.add(piece)
            self._end()
            return self._response(answers)

    async def events(self, answers: Answers) -> AsyncIterator[str]:
        number = 0

        def numbered(data: dict[str, Any]) -> str:
            nonlocal number
            number += 1
            return event({**data, "sequence_number": number - 1}, data["type"])

        for name in ("response.created", "response.in_progress"):
            yield numbered({"type": name, "response": self._response(None)})
        try:
            async for _, delta in answers:
                logprobs = self._logprobs(said(delta))
                for piece in self._answer.take(delta):
                    for data in self._items.add(piece, logprobs):
                        yield numbered(data)
                    logprobs = []
        except FathomError as error:
            failed = translated(error)
            told = error_body(str(failed), failed.status, failed.param, failed.code)["error"]
            yield numbered({**told, "type": "error"})
            return
        for data in self._end():
            yield numbered(data)
        response = self._response(answers)
        yield numbered({"type": f"response.{response['status']}", "response": response})

    def _end(self) -> list[dict[str, Any]]:
        """Close the last item; an answer that said nothing is an empty message."""
        nothing = [] if self._items.done else self._items.add(Piece("content", ""))
        return nothing + self._items.close(self._logprobs(self._answer.logprobs))

    def _logprobs(self, logprobs: Sequence[Logprob]) -> list[dict[str, Any]]:
        if self._wish.logprobs is None:
            return []
        return [self._server.spelling.chat_logprob(logprob) for logprob in logprobs]

    def _response(self, answers: Answers | None) -> dict[str, Any]:
        """The object as it stands; without `answers`, before the first token."""
        body, ended = self._body, self._answer.ended
        cut = ended is Ended.LENGTH
        status = "in_progress" if ended is None else "incomplete" if cut else "completed"
        choice = body.tool_choice or AUTO
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": self._items.done if answers else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {
                "effort": body.reasoning.effort if body.reasoning else None,
                "summary": None,
            },
            "store": False,
            "temperature": self._wish.temperature,
            "text": {"format": _format(body)},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": self._wish.top_p,
            "truncation": "disabled",
            "usage": self._usage(answers) if answers else None,
            "user": body.user,
        }

    def _usage(self, answers: Answers) -> dict[str, Any]:
        used = usage_of(answers.requests, self._answer.reader.reasoning_tokens)
        return {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": used["prompt_tokens_details"],
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": used["completion_tokens_details"],
            "total_tokens": used["total_tokens"],
        }


def _format(body: ResponsesBody) -> dict[str, Any]:
    form = body.text.format if body.text else None
    return form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}
