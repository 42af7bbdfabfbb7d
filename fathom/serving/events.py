"""Server-sent events, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from fathom.errors import FathomError
from fathom.serving.errors import ApiError, translated
from fathom.serving.service import Answers

T = TypeVar("T")
log = logging.getLogger("fathom.serving")

DONE = "data: [DONE]\n\n"
GRACE = 60.0
"""Seconds that a client may take to read what is left when an answer's time is up."""


def event(data: dict[str, Any], name: str | None = None) -> str:
    """One event. ASCII only: some clients take other line separators of Unicode for line ends."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n"


class EventStream(Response):
    """Answers as events. Refusals before the first one are ordinary errors with their status.

    The answers are opened when the response is sent and closed with it, so that a client that has gone, at whatever
    point, leaves nothing behind.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        opened: AbstractAsyncContextManager[Answers],
        events: Callable[[Answers], AsyncIterator[str]],
        seconds: float,
        last: str = DONE,
    ) -> None:
        """`events` makes the texts of events; `last` ends the stream; `seconds`: how long all may take."""
        super().__init__(headers={"X-Accel-Buffering": "no", "Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._opened, self._events, self._seconds, self._last = opened, events, seconds, last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_there(receive, self._talk(scope, receive, send))

    async def _talk(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._opened as answers, asyncio.timeout(self._seconds + GRACE):
                await send(self._start())
                await self._say(answers, send)
        except TimeoutError:
            log.warning("a client read its answer too slowly and was left")
        except (
            FathomError
        ) as error:  # before the start: `_say` tells what comes later in the stream
            await translated(error).response()(scope, receive, send)

    def _start(self) -> Message:
        return {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }

    async def _say(self, answers: Answers, send: Send) -> None:
        """All events; what goes wrong in between is the last of them."""
        try:
            async for text in self._events(answers):
                await send(_part(text))
        except FathomError as error:
            await send(_part(event(translated(error).body)))
        except Exception:
            log.exception("a stream failed")
            await send(_part(event(ApiError("the server failed; its log says why", 500).body)))
        await send(_part(self._last, more=False))


def _part(text: str, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


async def while_there(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` gives; it is cancelled, and None given, when the client goes away first."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """The JSON that `work` gives, unless the client goes away before."""
    reply = await while_there(request.receive, work)
    if reply is None:
        return Response(status_code=499)  # nobody reads it; the log does
    return JSONResponse(reply)
