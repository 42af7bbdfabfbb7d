"""The page by keyboard, on a phone, in the dark, without motion."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.page import probes
from tests.serving.page.chromium import SHIFT, Page
from tests.serving.page.fake_openai import Chunk, FakeOpenAI, piece, say
from tests.serving.page.hands import DONE, MARKDOWN, ask, endless

pytestmark = pytest.mark.browser


def test_by_keyboard(page: Page, server: FakeOpenAI) -> None:
    page.js("document.querySelector('#home').focus()")
    page.press("Tab", SHIFT)
    assert page.js("document.activeElement.id") == "skip"
    assert page.js("document.activeElement.getBoundingClientRect().top >= 0")
    page.press("Enter")
    assert page.js("document.activeElement.id") == "say"
    page.type("two")
    page.press("Enter", SHIFT)
    page.type("lines")
    assert page.js("document.activeElement.value") == "two\nlines"
    page.press("Enter")
    page.wait(DONE)
    assert server.received[-1]["messages"][0]["content"] == "two\nlines"
    page.wait("document.querySelector('#status').innerText == 'Answer: Hello.'")
    seen = set()
    for _ in range(40):
        page.press("Tab")
        seen.add(
            page.js(
                "document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"
            )
        )
        assert page.js(probes.FOCUS_SHOWS), page.js("document.activeElement.outerHTML")
    assert {
        "Settings",
        "Answer again",
        "Edit and send again",
        "Copy as Markdown",
        "Conversation",
    } <= seen


@pytest.mark.parametrize("width", [320, 390])
def test_on_a_phone(page: Page, server: FakeOpenAI, width: int) -> None:
    page.resize(width, 700, phone=True)
    assert page.js(probes.TOO_WIDE) == []
    long = "x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n"
    server.reply = lambda body: say(MARKDOWN + "\n" + long, 200)
    ask(page, "a" * 200)
    assert page.js(probes.TOO_WIDE) == []
    assert page.js("document.documentElement.scrollWidth") == width
    hidden = "getComputedStyle(document.querySelector('#sidebar')).visibility == 'hidden'"
    page.wait(hidden)
    page.click("#open-sidebar")
    page.wait("document.querySelector('#sidebar').getBoundingClientRect().left == 0")
    assert page.js("document.activeElement.id") == "close-sidebar"
    assert page.js(probes.SMALL_TARGETS) == []
    page.press("Escape")
    page.wait(hidden)
    assert page.js(probes.SMALL_TARGETS) == []
    page.click("#open-settings")
    page.wait("document.querySelector('#settings').open")
    assert page.js("document.querySelector('#settings').scrollWidth") <= width


def test_dark_and_light(page: Page) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    page.prefer(prefers_color_scheme="light")
    light = page.js(paper)
    page.prefer(prefers_color_scheme="dark")
    dark = page.js(paper)
    assert light != dark
    page.click("[name=theme][value=light]")
    assert page.js(paper) == light
    page.reload()
    page.wait("document.querySelector('.tries')")
    assert page.js(paper) == light
    page.click("[name=theme][value=auto]")
    assert page.js(paper) == dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(page: Page, server: FakeOpenAI, scheme: str) -> None:
    """Every text has the contrast 4.5 that WCAG asks for, on the colours behind it."""
    page.prefer(prefers_color_scheme=scheme)
    server.reply = lambda body: [
        piece(reasoning="hm"),
        *say(MARKDOWN),
        {"error": {"message": "no", "code": "x"}},
    ]
    ask(page, "contrast?")
    page.js("document.querySelector('.reasoning').open = true")
    assert page.js(probes.LOW_CONTRAST) == []


def test_without_motion(page: Page, server: FakeOpenAI) -> None:
    server.reply = endless
    moves = "document.getAnimations().length > 0"
    ask(page, "count", until="document.querySelector('.answer > .prose')?.innerText.includes('2')")
    page.wait(moves)
    page.prefer(prefers_reduced_motion="reduce")
    page.wait(f"!({moves})")
    page.press("Escape")
    page.wait(DONE)


def test_who_has_scrolled_up_is_left_alone(page: Page, server: FakeOpenAI) -> None:
    go_on = threading.Event()

    def reply(body: dict[str, Any]) -> Iterator[Chunk]:
        yield piece("line\n\n" * 80)
        go_on.wait(10)
        yield piece("line\n\n" * 80, finish="stop")

    server.reply = reply
    ask(page, "long", until="document.querySelectorAll('.answer p').length >= 80")
    scroll = "document.querySelector('#scroll')"
    page.wait(f"{scroll}.scrollTop + {scroll}.clientHeight > {scroll}.scrollHeight - 5")
    page.js("document.querySelector('#scroll').scrollTop = 100")
    page.wait("!document.querySelector('#latest').hidden")
    go_on.set()
    page.wait(DONE)
    assert page.js("document.querySelector('#scroll').scrollTop") == 100
    page.click("#latest")
    page.wait("document.querySelector('#latest').hidden")
