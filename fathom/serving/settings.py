"""What a server allows; every limit in one place."""

from __future__ import annotations

from dataclasses import dataclass

from fathom.errors import ServingError


@dataclass(frozen=True)
class Settings:
    """Limits and habits of one server. Raises `ServingError` for values that cannot be."""

    model_name: str = "fathom"
    """The id under which clients ask for the model."""
    api_keys: tuple[str, ...] = ()
    """Keys of which a client must show one; none lets everybody in."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the server from a browser; none by default, "*" for all."""
    max_waiting: int = 256
    """Answers that may wait for a place beside those that the engine runs; more get status 429."""
    max_body_bytes: int = 4 << 20
    """Longest body of a request."""
    max_prompt_tokens: int | None = None
    """Longest prompt; None leaves it to the model's context."""
    max_choices: int = 16
    """Answers that one request may ask for: `n` times its prompts."""
    body_seconds: float = 30.0
    """How long a client may take to send its request."""
    answer_seconds: float = 600.0
    """How long an answer may take, the wait in the queue included; then it ends with what there is."""
    drain_seconds: float = 600.0
    """How long accepted requests may go on after SIGTERM."""
    thinking: bool = False
    """Whether conversations think when the request does not say."""
    log_requests: bool = False
    """Whether the log holds what was asked and answered; otherwise sizes and times only."""

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_choices"):
            self._check(name, 1)
        self._check("max_waiting", 0)
        for name in ("body_seconds", "answer_seconds", "drain_seconds"):
            if getattr(self, name) <= 0:
                raise ServingError(f"{name}={getattr(self, name)} must be greater than 0")
        if self.max_prompt_tokens is not None:
            self._check("max_prompt_tokens", 1)
        if "" in self.api_keys:
            raise ServingError("an API key is empty; leave it out or give one")
        if not all(key.isascii() for key in self.api_keys):
            raise ServingError("an API key holds other characters than ASCII; headers cannot")

    def _check(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise ServingError(f"{name}={getattr(self, name)} must be at least {least}")
