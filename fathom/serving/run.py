"""A server as a process: it listens, and on SIGTERM or Ctrl-C it lets accepted requests finish.

    SIGTERM --> draining: new requests get 503, accepted ones go on --> none left, or time is up --> closed

A second signal does not wait any longer.
"""

from __future__ import annotations

import logging
import signal
import socket
import time
from types import FrameType

import uvicorn

from fathom.errors import ServingError
from fathom.inference import Engine
from fathom.serving.app import Application, build
from fathom.serving.settings import Settings

log = logging.getLogger("fathom.serving")

LAST_SECONDS = 5
"""How long connections have to close when draining is over."""


class DrainingServer(uvicorn.Server):
    """uvicorn that listens on while accepted requests finish."""

    def __init__(self, config: uvicorn.Config, application: Application) -> None:
        super().__init__(config)
        self._gate, self._settings = application.gate, application.server.settings
        self._until = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins draining, the second ends it."""
        if self._gate.draining:
            self.should_exit = self.force_exit = True
            return
        log.info(
            "%s: %d requests finish, new ones get 503", signal.Signals(sig).name, self._gate.live
        )
        self._gate.draining = True
        self._until = time.monotonic() + self._settings.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to end."""
        if self._gate.draining and (not self._gate.live or time.monotonic() > self._until):
            self.should_exit = True
        return await super().on_tick(counter)


def serve(
    engine: Engine, settings: Settings | None = None, host: str = "127.0.0.1", port: int = 8000
) -> None:
    """Serve an engine until a signal comes; port 0 takes a free one. Raises `ServingError` when it cannot listen."""
    application = build(engine, settings)
    with listening(host, port) as place:
        config = uvicorn.Config(
            application.asgi,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=LAST_SECONDS,
        )
        host, port = place.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        log.info("listening on http://%s:%d", shown, port)
        DrainingServer(config, application).run(sockets=[place])


def listening(host: str, port: int) -> socket.socket:
    """A socket for connections from anywhere that the address can be reached from."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        place = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ServingError(
            f"host={host} port={port} cannot be listened on ({error}); give another with --port or --host"
        ) from error
    # Connections inherit it. asyncio sets it only on sockets it has made itself, and without it every
    # second packet of a reply waits some 40 ms for the client's acknowledgement.
    place.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return place
