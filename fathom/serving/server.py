"""What the routes share: the engine's service, its tokenizer, limits and names."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any

from fathom.data import Tokenizer
from fathom.errors import ServingError
from fathom.inference import Engine
from fathom.serving.conversation import Limits
from fathom.serving.errors import ApiError
from fathom.serving.meters import Meters
from fathom.serving.service import Service
from fathom.serving.settings import Settings
from fathom.serving.spelling import Spelling


class Server:
    """One engine, served. Raises `ServingError` for an engine without a tokenizer."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        if engine.tokenizer is None:
            raise ServingError(
                "the engine has no tokenizer; a server needs one: give a directory that holds one"
            )
        self.engine, self.settings = engine, settings
        self.tokenizer: Tokenizer = engine.tokenizer
        self.meters = Meters(engine)
        self.service = Service(engine, settings, self.meters)
        self.spelling = Spelling(self.tokenizer)
        self.started = int(time.time())
        room = engine.pool.count * engine.pool.size
        context = min(engine.config.max_position_embeddings, room)
        self.limits = Limits(context, settings.max_prompt_tokens)

    def check_model(self, name: str) -> None:
        """Raises `ApiError` unless the model is the one that is served."""
        if name != self.settings.model_name:
            raise ApiError(
                f"model: {name!r} is not here; this server has {self.settings.model_name!r}",
                404,
                param="model",
                code="model_not_found",
            )


@dataclass(frozen=True)
class Head:
    """What all parts of one reply begin with."""

    id: str
    object: str
    created: int
    model: str

    @classmethod
    def of(cls, prefix: str, kind: str, model: str) -> Head:
        """A new one."""
        return cls(f"{prefix}-{secrets.token_hex(16)}", kind, int(time.time()), model)

    def with_(self, **more: Any) -> dict[str, Any]:
        """The JSON of a reply or of a part of it."""
        own = {"id": self.id, "object": self.object, "created": self.created, "model": self.model}
        return own | more
