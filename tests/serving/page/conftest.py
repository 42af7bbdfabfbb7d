"""A browser for all tests, and for each one a server and a page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving.page import chromium
from tests.serving.page.chromium import Chromium, Page
from tests.serving.page.fake_openai import FakeOpenAI


@pytest.fixture(scope="package")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    path = chromium.find()
    if path is None:
        pytest.skip("needs Chromium or Chrome")
    running = Chromium(path, tmp_path_factory.mktemp("chromium"))
    yield running
    running.close()


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    running = FakeOpenAI()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def page(browser: Chromium, server: FakeOpenAI) -> Iterator[Page]:
    """A page at the server; in the end nothing may have failed in it unseen."""
    opened = Page(browser)
    opened.go(server.url)
    opened.wait("document.querySelector('.tries')")
    yield opened
    told = [event["entry"] for event in opened.events("Log.entryAdded")]
    failures = [
        *opened.events("Runtime.exceptionThrown"),
        *(entry for entry in told if entry["source"] in ("security", "javascript")),
    ]
    opened.close()
    assert not failures, failures
