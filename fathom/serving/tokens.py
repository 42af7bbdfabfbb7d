"""POST /tokenize and /detokenize, in vLLM's form."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter

from fathom.data.chat import chat_ids
from fathom.errors import DataError
from fathom.serving.chat import message_of, thinks
from fathom.serving.errors import ApiError
from fathom.serving.schemas import DetokenizeBody, TokenizeBody
from fathom.serving.server import Server


def routes(server: Server) -> APIRouter:
    """Both routes, for a server."""
    router = APIRouter()

    @router.post("/tokenize", summary="Token ids of a text or of a conversation")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        if body.model is not None:
            server.check_model(body.model)
        ids = await asyncio.to_thread(_ids, body, server)
        spelled = [server.spelling.text(i) for i in ids] if body.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": server.limits.context,
            "tokens": ids,
            "token_strs": spelled,
        }

    @router.post("/detokenize", summary="The text of token ids")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        if body.model is not None:
            server.check_model(body.model)
        size = server.engine.config.vocab_size
        if wrong := [token for token in body.tokens if token >= size]:
            raise ApiError(
                f"tokens: {wrong[0]} is outside the vocabulary of {size}", param="tokens"
            )
        return {"prompt": server.tokenizer.decode(body.tokens)}

    return router


def _ids(body: TokenizeBody, server: Server) -> list[int]:
    field = "prompt" if body.messages is None else "messages"
    try:
        if body.messages is None:
            read = (
                server.tokenizer.prompt_ids if body.add_special_tokens else server.tokenizer.encode
            )
            return read(body.prompt or "")
        return chat_ids(
            server.tokenizer,
            [message_of(message) for message in body.messages],
            body.add_generation_prompt,
            [tool.function.model_dump() for tool in body.tools or ()],
            thinks(body.chat_template_kwargs, None, server.settings.thinking),
        )
    except DataError as error:
        raise ApiError(f"{field}: {error}", param=field) from error
