"""What every request passes before the app sees it: draining, keys, the body's size and time; and what leaves it.

The body is read here, whole and bounded, so that nothing behind has to think of it. What comes after the body (that
the client has gone) is passed on.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fathom.serving.errors import ApiError
from fathom.serving.meters import Meters
from fathom.serving.settings import Settings

log = logging.getLogger("fathom.serving")

OPEN_TO_ALL = ("/", "/health")
"""Paths that need no key: they tell nothing of anybody."""
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class Gone(Exception):
    """The client went away before it had sent its request."""


class Gate:
    """ASGI middleware. `live` counts the requests inside; `draining` refuses new ones."""

    def __init__(self, app: ASGIApp, settings: Settings, meters: Meters) -> None:
        self.app, self.settings, self.meters = app, settings, meters
        self.live = 0
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        outgoing = _Outgoing(send)
        started = time.monotonic()
        if self.draining:
            await self._refuse(self._leaving(), scope, receive, outgoing)
            return
        self.live += 1
        try:
            await self._pass(scope, receive, outgoing)
        finally:
            self.live -= 1
            self._note(scope, outgoing.status, time.monotonic() - started)

    async def _pass(self, scope: Scope, receive: Receive, send: _Outgoing) -> None:
        try:
            self._check_key(scope)
            body = await self._read(scope, receive)
        except ApiError as refusal:
            await self._refuse(refusal, scope, receive, send)
        except Gone:
            pass
        else:
            await self.app(scope, _Again(body, receive), send)

    async def _refuse(self, refusal: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        await refusal.response()(scope, receive, send)

    def _leaving(self) -> ApiError:
        headers = {"Retry-After": "5", "Connection": "close"}
        return ApiError("the server is shutting down", 503, code="draining", headers=headers)

    def _check_key(self, scope: Scope) -> None:
        if not self.settings.api_keys or scope["path"] in OPEN_TO_ALL or _is_preflight(scope):
            return
        scheme, _, shown = _header(scope, b"authorization").partition(b" ")
        # Every key is compared, so that the time says nothing of which was nearly right.
        found = [hmac.compare_digest(shown.strip(), key.encode()) for key in self.settings.api_keys]
        if scheme.lower() != b"bearer" or not any(found):
            raise ApiError(
                "a valid API key is needed; send it as 'Authorization: Bearer KEY'",
                401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The body. Raises `ApiError` when it is too long or takes too long, `Gone` when it never ends."""
        limit = self.settings.max_body_bytes
        announced = _header(scope, b"content-length")
        if announced.isdigit() and int(announced) > limit:
            raise self._too_long()
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                async for part in _parts(receive):
                    body += part
                    if len(body) > limit:
                        raise self._too_long()
        except TimeoutError:
            raise ApiError(
                f"the body did not arrive within {self.settings.body_seconds:g} seconds",
                408,
                headers={"Connection": "close"},
            ) from None
        return bytes(body)

    def _too_long(self) -> ApiError:
        return ApiError(
            f"the body is longer than this server's limit of {self.settings.max_body_bytes:,} bytes",
            413,
            headers={"Connection": "close"},
        )

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        """A line in the log, without anything of what was said; 499 is a client that went away."""
        route = scope.get("route")
        path = getattr(route, "path", None) or ("/" if scope["path"] == "/" else "other")
        self.meters.counted_http(path, status)
        log.info("%s %s %d %.3fs", scope["method"], path, status, seconds)


class _Outgoing:
    """`send`, with our headers added and the status remembered."""

    def __init__(self, send: Send) -> None:
        self._send, self.status = send, 499

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            present = {name.lower() for name, _ in message.get("headers", ())}
            message.setdefault("headers", [])
            more = [pair for pair in HEADERS if pair[0] not in present]
            message = {**message, "headers": [*message["headers"], *more]}
        await self._send(message)


class _Again:
    """`receive` that gives the body that was read, and then what comes after it."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


async def _parts(receive: Receive) -> AsyncIterator[bytes]:
    """The body as it comes."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _header(scope: Scope, name: bytes) -> bytes:
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    return next((value for key, value in headers if key == name), b"")


def _is_preflight(scope: Scope) -> bool:
    """A browser's question whether it may call; it carries no key."""
    return scope["method"] == "OPTIONS" and bool(_header(scope, b"access-control-request-method"))
