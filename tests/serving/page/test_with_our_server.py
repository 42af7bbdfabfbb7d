"""The page as `fathom serve` gives it, under the server's own policy, with a model behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.page.chromium import Chromium, Page
from tests.serving.page.hands import ANSWER, DONE, ask, text

pytest.importorskip("tests.serving.live", reason="needs the server")
pytestmark = pytest.mark.browser


@pytest.fixture
def opened(browser: Chromium, live: Any) -> Iterator[Page]:
    """The server's page, at rest."""
    page = Page(browser)
    page.go(live.url + "/")
    page.wait("document.querySelector('#only-model').innerText")
    yield page
    told = [event["entry"] for event in page.events("Log.entryAdded")]
    assert not [entry for entry in told if entry["source"] in ("security", "javascript")]
    assert not page.events("Runtime.exceptionThrown")
    page.close()


def test_an_answer(opened: Page, live: Any) -> None:
    live.engine.say("The **answer** is: `look`")
    live.engine.pause = 0.02  # or it would be over before a rate can be measured
    ask(opened, "Hello")
    assert text(opened, ANSWER) == "The answer is: look"
    assert text(opened, f"{ANSWER} strong") == "answer"
    meter = text(opened, ".meter")
    tokens = len(live.engine.script) - 1, len(live.engine.script)  # the end is a token or none
    assert any(f"{number} tokens\n" in meter for number in tokens) and "tokens/s" in meter


def test_who_stops_frees_the_engine(opened: Page, live: Any) -> None:
    live.engine.pause = 0.01
    ask(opened, "Hello", until="document.querySelector('.answer > .prose')?.innerText.length > 20")
    assert live.engine.busy
    opened.press("Escape")
    opened.wait(DONE)
    live.wait_until_idle()


def test_a_text_and_a_refusal(opened: Page, live: Any) -> None:
    live.engine.say(" answer is: look")
    opened.click("[name=mode][value=text]")
    made = "document.querySelector('.made') && document.querySelector('#stop').hidden"
    ask(opened, "The", until=made)
    assert text(opened, ".text") == "The answer is: look"
    opened.js("document.querySelector('#open-settings').click()")
    field = "document.querySelector('#set-max_tokens')"
    opened.js(f"{field}.value = 99999; {field}.dispatchEvent(new Event('input'))")
    opened.press("Escape")
    ask(opened, ", and", until="document.querySelector('.fault')")
    assert "field max_tokens" in text(opened, ".fault")
    assert "exceed the context" in text(opened, ".fault")
