"""One server for the tests that need no settings of their own."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.serving.live import Live, serving


@pytest.fixture(scope="session")
def shared() -> Iterator[Live]:
    with serving() as live:
        yield live


@pytest.fixture
def live(shared: Live) -> Iterator[Live]:
    """The shared server, idle, its model speaking for itself."""
    shared.wait_until_idle()
    shared.engine.script, shared.engine.pause = (), 0.0
    yield shared
    shared.engine.script, shared.engine.pause = (), 0.0
    shared.wait_until_idle()


@pytest.fixture
def client(live: Live) -> openai.OpenAI:
    """The official client, with nothing changed."""
    return openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0, timeout=30)
