"""Conversations in the browser: versions, history, settings, texts that are continued."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.page.chromium import Chromium, Page
from tests.serving.page.fake_openai import Chunk, FakeOpenAI, piece, say, text_piece, usage
from tests.serving.page.hands import ANSWER, DONE, ask, count, text, texts

pytestmark = pytest.mark.browser


def test_answer_again_and_edit_keep_what_was(page: Page, server: FakeOpenAI) -> None:
    numbers = itertools.count(1)
    server.reply = lambda body: say(f"Answer {next(numbers)}")
    ask(page, "first")
    page.click(".answer .icon[aria-label='Answer again']")
    page.wait("document.querySelector('.answer > .prose')?.innerText == 'Answer 2'")
    assert server.received[1]["messages"] == [{"role": "user", "content": "first"}]
    page.wait("document.querySelector('.which')")
    assert text(page, ".which") == "2 / 2"
    page.click(".which .icon")
    assert text(page, ANSWER) == "Answer 1"
    page.click(".question .icon[aria-label^=Edit]")
    assert page.js("document.activeElement.value") == "first"
    page.type(", edited")
    page.press("Enter")
    page.wait("document.querySelector('.answer > .prose')?.innerText == 'Answer 3'")
    assert server.received[-1]["messages"] == [{"role": "user", "content": "first, edited"}]
    page.click(".question .which .icon")
    assert text(page, ".question .said") == "first"
    assert text(page, ANSWER) == "Answer 2"


def test_history(page: Page, server: FakeOpenAI, tmp_path: Path) -> None:
    ask(page, "alpha")
    page.click("#new")
    ask(page, "beta")
    assert texts(page, "#chats a") == ["beta", "alpha"]
    page.reload()
    page.wait("document.querySelector('.answer')")
    assert text(page, ".question .said") == "beta"
    page.click("#chats li:nth-child(2) a")
    page.wait("document.querySelector('.question .said').innerText == 'alpha'")
    assert page.js("document.title") == "alpha – fathom"

    page.browser("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.click("#export-all")
    until = time.monotonic() + 5
    while not (found := list(tmp_path.glob("fathom-*.json"))) and time.monotonic() < until:
        time.sleep(0.02)
    exported = json.loads(found[0].read_text())
    said = [[node["content"] for node in chat["nodes"].values()] for chat in exported]
    assert sorted(said) == [["alpha", "Hello."], ["beta", "Hello."]]

    page.click("#chats li:nth-child(2) .icon")
    page.wait("document.querySelectorAll('#chats a').length == 1")
    assert (
        page.js("Object.keys(localStorage).filter((k) => k.startsWith('fathom.chat.')).length") == 1
    )
    page.click("#toast button")
    page.wait("document.querySelectorAll('#chats a').length == 2")


def test_two_conversations_at_once(page: Page, server: FakeOpenAI) -> None:
    go_on = threading.Event()

    def reply(body: dict[str, Any]) -> Iterator[Chunk]:
        if body["messages"][-1]["content"] == "slow":
            yield piece("slow ")
            go_on.wait(10)
        yield from say("answer")

    server.reply = reply
    ask(page, "slow", until="document.querySelector('.answer > .prose')?.innerText == 'slow'")
    page.click("#new")
    page.wait("document.querySelector('.empty')")
    ask(page, "fast")
    assert text(page, ANSWER) == "answer"
    assert count(page, "#chats li.live") == 1
    go_on.set()
    page.wait("!document.querySelector('#chats li.live')")
    page.click("#chats li:has(a[title=slow]) a")
    page.wait("document.querySelector('.answer > .prose').innerText == 'slow answer'")


def fill(page: Page, name: str, value: str) -> None:
    """Write into a field of the settings."""
    field = f"document.querySelector('#set-{name}')"
    page.js(f"{field}.value = {json.dumps(value)}")
    page.js(f"{field}.dispatchEvent(new Event('input'))")


def test_settings_are_sent_and_kept(page: Page, server: FakeOpenAI) -> None:
    page.click("#open-settings")
    wanted = {
        "temperature": "0.3",
        "top_p": "0.9",
        "top_k": "40",
        "min_p": "0.05",
        "max_tokens": "64",
        "repetition_penalty": "1.1",
        "presence_penalty": "0.2",
        "frequency_penalty": "-0.1",
        "seed": "11",
    }
    for name, value in wanted.items():
        fill(page, name, value)
    fill(page, "system", "Be brief.")
    fill(page, "stop", "END\n\\n\\n")
    fill(page, "top_k", "2.5")  # not a whole number: not taken
    page.js("document.querySelector('[name=thinking][value=on]').click()")
    page.press("Escape")
    page.reload()
    page.wait("document.querySelector('.tries')")
    ask(page, "?")
    sent = server.received[-1]
    assert {name: sent[name] for name in wanted} == {
        name: json.loads(value) for name, value in wanted.items()
    }
    assert sent["stop"] == ["END", "\n\n"]
    assert sent["chat_template_kwargs"] == {"thinking": True}
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    page.click("#open-settings")
    page.click(".settings > button")
    page.press("Escape")
    ask(page, "??", until="document.querySelectorAll('.answer').length == 2 && " + DONE)
    assert set(server.received[-1]) == {"path", "model", "messages", "stream", "stream_options"}


def test_texts_are_continued(page: Page, server: FakeOpenAI) -> None:
    server.reply = lambda body: [
        text_piece(" there was"),
        text_piece(" a <b>ship", "length"),
        {"choices": [], "usage": usage(5)},
    ]
    page.click("[name=mode][value=text]")
    page.wait("document.querySelector('#say').placeholder.includes('beginning')")
    ask(page, "Once upon a time,")
    first = server.received[-1]
    assert first["path"] == "/v1/completions" and first["prompt"] == "Once upon a time,"
    assert first["max_tokens"] == 200 and "messages" not in first
    assert text(page, ".text") == "Once upon a time, there was a <b>ship"
    assert text(page, ".text .made") == " there was a <b>ship"
    page.js("document.querySelector('#say').focus()")
    page.press("Enter")  # nothing written: go on
    page.wait("document.querySelectorAll('.text .made').length == 2 && " + DONE)
    assert server.received[-1]["prompt"] == "Once upon a time, there was a <b>ship"
    page.click(".icon[aria-label='Another continuation']")
    page.wait("document.querySelector('.which')?.innerText == '2 / 2' && " + DONE)
    page.click(".icon[aria-label='Edit the text']")
    page.js("document.activeElement.value = 'Anew'")
    page.click(".edit .main")
    page.wait("document.querySelector('.text').innerText == 'Anew'")
    page.click(".acts .plain")
    page.wait("document.querySelectorAll('.text .made').length == 1 && " + DONE)
    assert server.received[-1]["prompt"] == "Anew"


def test_a_base_model_gets_texts(browser: Chromium, server: FakeOpenAI) -> None:
    server.models = [{"id": "nano", "taught_to_chat": False}]
    page = Page(browser)
    page.go(server.url)
    page.wait("document.querySelector('[name=mode][value=text]')?.checked")
    page.close()


def test_models_can_be_chosen(browser: Chromium, server: FakeOpenAI) -> None:
    server.models = [{"id": "one"}, {"id": "two"}]
    page = Page(browser)
    page.go(server.url)
    page.wait("document.querySelector('#model').options.length == 2")
    page.js("document.querySelector('#model').value = 'two'")
    page.js("document.querySelector('#model').dispatchEvent(new Event('change'))")
    ask(page, "?")
    assert server.received[-1]["model"] == "two"
    page.close()
