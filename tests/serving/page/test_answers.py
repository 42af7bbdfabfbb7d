"""What a model says, and how the page shows it, in headless Chromium."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.page import probes
from tests.serving.page.chromium import Page
from tests.serving.page.fake_openai import Chunk, FakeOpenAI, piece, say, usage
from tests.serving.page.hands import ANSWER, DONE, MARKDOWN, ask, count, text, texts

pytestmark = pytest.mark.browser


def test_markdown(page: Page, server: FakeOpenAI) -> None:
    server.reply = lambda body: say(MARKDOWN)
    ask(page, "tides?")
    inside = f"{ANSWER} "
    assert texts(page, inside + "h3") == ["Tides"]
    assert texts(page, inside + "p em") == ["moon"]
    assert texts(page, inside + "p strong") == ["sun"]
    assert texts(page, inside + "p del") == ["nothing"]
    assert texts(page, inside + "p code") == ["else"]
    assert "snake_case_name stays, 2 * 3 * 4 too." in text(page, inside + "p")
    links = "[...document.querySelectorAll('.prose a')].map((a) => [a.innerText, a.href, a.rel])"
    assert page.js(links) == [
        ["a page", "https://example.org/tides", "noopener noreferrer nofollow"],
        ["https://example.org/moon", "https://example.org/moon", "noopener noreferrer nofollow"],
    ]
    assert count(page, inside + "ol > li") == 2
    assert texts(page, inside + "ol ul li") == ["inner one", "inner two"]
    assert page.js("[...document.querySelectorAll('.task input')].map((e) => e.checked)") == [
        True,
        False,
    ]
    assert texts(page, inside + "th") == ["body", "pull"]
    assert texts(page, inside + "td") == ["moon", "2.2", "sun | star", "1"]
    assert text(page, inside + "blockquote") == "quoted\ntwice"
    assert count(page, inside + "hr") == 1
    assert text(page, inside + "pre") == 'def pull(mass):  # newton\n    return "G" * mass'
    assert texts(page, inside + "pre .comment") == ["# newton"]


@pytest.mark.parametrize("size", [1, 3, 50])
def test_pieces_make_the_same_page(page: Page, server: FakeOpenAI, size: int) -> None:
    """Whatever the pieces, the end is what the whole text at once would be."""
    server.reply = lambda body: say(MARKDOWN, size)
    ask(page, "tides?")
    shown = "document.querySelector('.answer > .prose').cloneNode(true).outerHTML"
    streamed = page.js(shown)
    page.reload()
    page.wait("document.querySelector('.answer')")
    assert page.js(shown) == streamed


def test_code_is_copied(page: Page, server: FakeOpenAI) -> None:
    page.browser(
        "Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    server.reply = lambda body: say("```sh\nls -l | wc\n```\n\nand `more`")
    ask(page, "?")
    page.click(".code button")
    page.wait("document.querySelector('.code button [href=\"#i-check\"]')")
    assert page.js("navigator.clipboard.readText()") == "ls -l | wc"
    page.click(".answer .acts .icon[aria-label^=Copy]")
    page.wait("navigator.clipboard.readText().then((text) => text.includes('and `more`'))")


ATTACKS = r"""<script>window.pwned = 1</script>
<img src=x onerror="window.pwned = 1">
[a](javascript:window.pwned=1) [b](JAVASCRIPT:window.pwned=1) [c](data:text/html,<script>pwned=1</script>)
[d](//evil.example/) [e](/metrics) <javascript:pwned=1> ![pixel](https://evil.example/pixel.png)
[f](https://good.example/"onmouseover="pwned=1) <https://good.example/<script>pwned=1</script>>

| <iframe src="javascript:pwned=1"></iframe> | b |
|---|---|
| <svg onload=pwned=1> | <details open ontoggle=pwned=1> |

```html"><img src=x onerror=pwned=1>
</code></pre><script>window.pwned = 1</script>
```

# <style>* { display: none }</style>
&lt;img src=x onerror=pwned=1&gt;
"""


def test_nothing_a_model_says_is_alive(page: Page, server: FakeOpenAI) -> None:
    server.reply = lambda body: [
        piece(reasoning=ATTACKS, usage=usage(1)),
        piece(ATTACKS, usage=usage(2)),
        piece(finish="stop"),
    ]
    ask(page, "<img src=x onerror=pwned=1>")
    page.js("document.querySelector('.reasoning').open = true")
    page.click("#open-settings")
    page.press("Escape")
    assert page.js("window.pwned === undefined")
    alive = "script, img, iframe, style, object, embed, form, svg:not([aria-hidden])"
    assert count(page, f"#thread :is({alive})") == 0
    assert page.js(probes.HANDLERS) == []
    hosts = set(
        page.js("[...document.querySelectorAll('#thread a')].map((a) => new URL(a.href).host)")
    )
    assert hosts == {"evil.example", "good.example"}  # addresses somebody may choose to follow
    assert "<script>window.pwned = 1</script>" in text(page, ANSWER)
    assert "<img src=x onerror=pwned=1>" in text(page, ANSWER)
    asked = {event["request"]["url"] for event in page.events("Network.requestWillBeSent")}
    assert all(url.startswith((server.url, "data:image/svg")) for url in asked), asked


@pytest.mark.parametrize(
    "part",
    [
        "[",
        "![",
        "> ",
        "*a ",
        "**a_b ",
        "- " * 40 + "x\n",
        "`" * 3 + " ",
        "\\(",
        "$$\n",
        "<https://a",
        "| a | b |\n|---|---|\n",
        "a* _b ",
    ],
)
def test_hostile_text_does_not_freeze_the_page(page: Page, server: FakeOpenAI, part: str) -> None:
    hostile = part * (20_000 // len(part))
    server.reply = lambda body: [piece(hostile), piece(finish="stop")]
    started = time.monotonic()
    ask(page, "?")
    assert time.monotonic() - started < 3
    assert page.js(probes.DEPTH) < 80


def test_reasoning(page: Page, server: FakeOpenAI) -> None:
    speak = threading.Event()

    def reply(body: dict[str, Any]) -> Iterator[Chunk]:
        yield piece(reasoning="Let me *see*.")
        speak.wait(10)
        yield from say("It is seven.")

    server.reply = reply
    ask(page, "three and four?", until="document.querySelector('.reasoning.live')")
    assert text(page, ".reasoning summary") == "Thinking"
    assert text(page, ".reasoning .prose") == "Let me see."
    speak.set()
    page.wait(DONE)
    assert text(page, ".reasoning summary").startswith("Thought for ")
    assert page.js("document.querySelector('.reasoning').open") is False
    page.click(".reasoning summary")
    page.wait("document.querySelector('.reasoning').open")
    assert text(page, ".reasoning .prose em") == "see"
    ask(page, "and five?", until="document.querySelectorAll('.answer').length == 2 && " + DONE)
    assert server.received[-1]["messages"] == [
        {"role": "user", "content": "three and four?"},
        {"role": "assistant", "content": "It is seven."},
        {"role": "user", "content": "and five?"},
    ]


def test_figures_come_live_and_stay(page: Page, server: FakeOpenAI) -> None:
    more = threading.Event()

    def reply(body: dict[str, Any]) -> Iterator[Chunk]:
        yield piece("one ", usage=usage(2, 1, 0))
        time.sleep(0.5)
        yield piece("two ", usage=usage(12, 6, 2))
        more.wait(10)
        yield piece("three", finish="stop", usage=usage(22, 12, 4))

    server.reply = reply
    ask(
        page,
        "count",
        until="document.querySelector('.meter b') && !document.querySelector('#stop').hidden",
    )
    live = text(page, ".meter")
    assert "12 tokens" in live and "75 % of 8 drafts accepted" in live
    rate = float(text(page, ".meter b"))
    assert 10 < rate < 40  # ten tokens after the first two, in about half a second
    more.set()
    page.wait(DONE)
    final = text(page, ".meter")
    assert "22 tokens" in final and "75 % of 16 drafts accepted" in final and "first after" in final
    assert server.received[0]["stream_options"] == {
        "include_usage": True,
        "continuous_usage_stats": True,
    }
