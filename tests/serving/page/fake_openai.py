"""A server that speaks as OpenAI's does and says what a test tells it to, with the chat page at its root."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fathom

PAGE = Path(fathom.__file__).parent / "serving" / "page" / "index.html"
Chunk = dict[str, Any]


class Refusal(Exception):
    """An answer that is an error, with its status."""

    def __init__(
        self, status: int, message: str, headers: dict[str, str] | None = None, **error: Any
    ):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": "invalid_request_error", **error}}


def usage(tokens: int, accepted: int = 0, rejected: int = 0) -> Chunk:
    """What chunks carry under "usage"."""
    details = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected}
    return {
        "prompt_tokens": 7,
        "completion_tokens": tokens,
        "total_tokens": 7 + tokens,
        "completion_tokens_details": details,
    }


def piece(content: str = "", reasoning: str = "", finish: str | None = None, **more: Any) -> Chunk:
    """A chunk of a chat answer."""
    delta = {"content": content} if content else {}
    if reasoning:
        delta["reasoning_content"] = reasoning
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


def text_piece(text: str, finish: str | None = None) -> Chunk:
    """A chunk of a continued text."""
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}


def say(content: str, size: int = 7) -> Iterator[Chunk]:
    """A chat answer in small chunks, with its usage."""
    pieces = [content[at : at + size] for at in range(0, len(content), size)]
    for count, part in enumerate(pieces, 1):
        yield piece(part, usage=usage(count))
    yield piece(finish="stop", usage=usage(len(pieces)))


def policy(html: str) -> str:
    """The strictest policy under which the page can work: its own script and style, its own server, no text as HTML."""
    rules = {
        "default-src": "'none'",
        "script-src": _hash(html, "script"),
        "style-src": _hash(html, "style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hash(html: str, tag: str) -> str:
    (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"


class FakeOpenAI(ThreadingHTTPServer):
    """Set `reply` to a function from a request's body to chunks.

    It may raise `Refusal`, or yield None to cut the line.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply: Callable[[dict[str, Any]], Iterable[Chunk | None]] = lambda body: say("Hello.")
        self.models: list[Chunk] = [{"id": "nano", "object": "model"}]
        self.key: str | None = None
        self.received: list[dict[str, Any]] = []
        self.left = threading.Event()
        """Set when a client went away in the middle of an answer."""
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: FakeOpenAI

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        if self.path == "/":
            html = PAGE.read_text(encoding="utf-8")
            self._send(
                200,
                html.encode(),
                {"Content-Type": "text/html", "Content-Security-Policy": policy(html)},
            )
        elif self.path != "/v1/models":
            self._refuse(Refusal(404, "there is nothing here"))
        elif self._allowed():
            self._send(200, json.dumps({"object": "list", "data": self.server.models}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        self.server.received.append({"path": self.path, **body})
        try:
            chunks = self.server.reply(body)
        except Refusal as refusal:
            self._refuse(refusal)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._stream(chunks)
        except ConnectionError:
            self.server.left.set()

    def _stream(self, chunks: Iterable[Chunk | None]) -> None:
        for chunk in chunks:
            if chunk is None:
                return
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def _allowed(self) -> bool:
        key = self.server.key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return True
        self._refuse(Refusal(401, "give an API key as a bearer token", code="invalid_api_key"))
        return False

    def _refuse(self, refusal: Refusal) -> None:
        self._send(refusal.status, json.dumps(refusal.body).encode(), refusal.headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
