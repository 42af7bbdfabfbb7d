"""The application: routes, errors, the gate before them, and the engine's life."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

import fathom
from fathom.inference import Engine
from fathom.serving import about, chat, completions, errors, responses, tokens
from fathom.serving.gate import Gate
from fathom.serving.server import Server
from fathom.serving.settings import Settings


class Problem(BaseModel):
    """What is inside an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ProblemBody(BaseModel):
    """Every refusal."""

    error: Problem


@dataclass(frozen=True)
class Application:
    """What a web server runs (`asgi`), and what others may want to look at."""

    asgi: ASGIApp
    gate: Gate
    server: Server


def build(engine: Engine, settings: Settings | None = None) -> Application:
    """An ASGI application that serves an engine; the engine belongs to it from then on.

    Raises `ServingError` for an engine without a tokenizer.
    """
    settings = settings or Settings()
    server = Server(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.service.start()
        yield
        await server.service.close()

    # The usual documentation pages load scripts from elsewhere; /openapi.json is all there is.
    app = FastAPI(
        title="fathom",
        version=fathom.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": ProblemBody, "description": "A refusal"}},
    )
    for part in (chat, completions, responses, tokens, about):
        app.include_router(part.routes(server))
    errors.install(app)
    gate = Gate(app, settings, server.meters)
    return Application(_with_cors(gate, settings), gate, server)


def _with_cors(app: ASGIApp, settings: Settings) -> ASGIApp:
    """Outermost, so that refusals can be read by the pages that may call."""
    if not settings.cors_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=settings.cors_origins,
        allow_methods=("GET", "POST"),
        allow_headers=("Authorization", "Content-Type"),
    )
