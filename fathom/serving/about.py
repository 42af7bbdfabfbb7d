"""What a server says of itself: /v1/models, /health, /metrics, and the chat page at /."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from fathom.serving import chat_page
from fathom.serving.server import Server

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def routes(server: Server) -> APIRouter:
    """All of them, for a server."""
    router = APIRouter()

    @router.get("/v1/models", summary="The models: one")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(server)]}

    @router.get("/v1/models/{name:path}", summary="A model")
    async def model(name: str) -> dict[str, Any]:
        server.check_model(name)
        return _model(server)

    @router.get("/health", summary="Whether the engine works")
    async def health() -> Response:
        well = server.service.healthy
        return JSONResponse({"status": "ok" if well else "stopped"}, 200 if well else 503)

    @router.get("/metrics", summary="Metrics for Prometheus")
    async def metrics() -> Response:
        return Response(server.meters.text(), headers={"Content-Type": METRICS_TYPE})

    @router.get("/", include_in_schema=False)
    async def root() -> Response:
        return Response(chat_page.page(), headers=chat_page.headers())

    return router


def _model(server: Server) -> dict[str, Any]:
    return {
        "id": server.settings.model_name,
        "object": "model",
        "created": server.started,
        "owned_by": "fathom",
        "max_model_len": server.limits.context,
        "taught_to_chat": server.tokenizer.taught_to_chat,
    }
