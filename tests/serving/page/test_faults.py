"""What the page does when something goes wrong, and how answers are stopped."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serving.page.chromium import Chromium, Page
from tests.serving.page.fake_openai import Chunk, FakeOpenAI, Refusal, piece, say
from tests.serving.page.hands import ANSWER, DONE, ask, count, endless, text

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("way", ["key", "button"])
def test_stop(page: Page, server: FakeOpenAI, way: str) -> None:
    server.reply = endless
    ask(page, "count", until="document.querySelector('.answer > .prose').innerText.includes('3')")
    if way == "key":
        page.press("Escape")
    else:
        page.click("#stop")
    page.wait(DONE)
    assert server.left.wait(5)
    assert text(page, ".answer .note") == "Stopped."
    assert text(page, ANSWER).startswith("0 1 2 3")
    assert count(page, ".fault") == 0
    assert page.js("document.activeElement.id") == "say"


def test_an_error_in_the_middle(page: Page, server: FakeOpenAI) -> None:
    error = {"error": {"message": "the engine failed", "type": "server_error", "code": None}}
    server.reply = lambda body: [piece("Half a "), error]
    ask(page, "?")
    assert text(page, ANSWER) == "Half a"
    assert "the engine failed" in text(page, ".fault[role=alert]")
    server.reply = lambda body: say("A whole answer.")
    page.click(".fault button")
    page.wait("document.querySelector('.answer > .prose')?.innerText == 'A whole answer.'")
    assert text(page, ".which") == "2 / 2"  # what had come is still there


def test_a_line_that_is_cut(page: Page, server: FakeOpenAI) -> None:
    server.reply = lambda body: [piece("Half a "), None]
    ask(page, "?")
    assert "ended before the answer did" in text(page, ".fault")
    assert text(page, ANSWER) == "Half a"


def test_a_refusal_is_told_in_the_servers_words(page: Page, server: FakeOpenAI) -> None:
    def refuse(body: dict[str, Any]) -> list[Chunk]:
        raise Refusal(429, "9 answers wait already", {"Retry-After": "4"}, param="n", code="busy")

    server.reply = refuse
    ask(page, "?")
    shown = text(page, ".fault")
    for part in ("9 answers wait already", "HTTP 429", "field n", "busy", "again in 4 s"):
        assert part in shown
    server.reply = lambda body: say("Now.")
    page.click(".fault button")
    page.wait("document.querySelector('.answer > .prose')?.innerText == 'Now.'")
    assert count(page, ".fault") == 0 and count(page, ".which") == 0
    assert server.received[-1]["messages"] == [{"role": "user", "content": "?"}]


def test_nobody_answers(page: Page, server: FakeOpenAI) -> None:
    server.shutdown()
    server.server_close()
    ask(page, "?")
    assert "cannot be reached" in text(page, ".fault")


def test_a_key_is_asked_for(browser: Chromium, server: FakeOpenAI) -> None:
    server.key = "sk-right"
    page = Page(browser)
    page.go(server.url)
    page.wait("document.querySelector('.fault form')")
    page.js("document.querySelector('.fault input').focus()")
    page.type("sk-wrong")
    page.press("Enter")
    page.wait("document.querySelector('.fault input')?.value === ''")
    page.js("document.querySelector('.fault input').focus()")
    page.type("sk-right")
    page.press("Enter")
    page.wait("!document.querySelector('.fault')")
    ask(page, "?")
    assert text(page, ANSWER) == "Hello."
    assert page.js("Object.values(localStorage).every((value) => !value.includes('sk-'))")
    page.close()
