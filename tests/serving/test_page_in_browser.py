"""The chat page end to end in headless Chromium, against a server that says what each test wants it to say."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import chromium
from tests.serving.chromium import SHIFT, Chromium, Page
from tests.serving.fake_openai import Chunk, FakeOpenAI, Refusal, piece, say, text_piece, usage

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium.find() is None, reason="needs Chromium or Chrome"),
]
ANSWER = ".answer > .prose"
DONE = "document.querySelector('.answer') && document.querySelector('#stop').hidden"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    running = Chromium(chromium.find() or "", tmp_path_factory.mktemp("chromium"))
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
    failures = [
        *opened.events("Runtime.exceptionThrown"),
        *(e for e in opened.events("Log.entryAdded") if e["entry"]["source"] in ("security", "javascript")),
    ]
    opened.close()
    assert not failures, failures


def ask(page: Page, text: str, until: str = DONE) -> None:
    """Write a message, send it, wait."""
    page.js("document.querySelector('#say').focus()")
    page.type(text)
    page.press("Enter")
    page.wait(until)


def text(page: Page, selector: str) -> str:
    return page.js(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")


def texts(page: Page, selector: str) -> list[str]:
    return page.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.innerText)")


def count(page: Page, selector: str) -> int:
    return page.js(f"document.querySelectorAll({json.dumps(selector)}).length")


# --- what a model says ------------------------------------------------------------------------------

MARKDOWN = """# Tides

The *moon* pulls, the __sun__ helps, ~~nothing~~ `else` does; snake_case_name stays, 2 * 3 * 4 too.
See [a page](https://example.org/tides "title") and https://example.org/moon.

1. first
   - inner one
   - inner two
2. second

- [x] done
- [ ] open

| body | pull |
|:-----|-----:|
| moon | **2.2** |
| sun \\| star | 1 |

> quoted
> twice

---

```python
def pull(mass):  # newton
    return "G" * mass
```
"""


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
    assert page.js("[...document.querySelectorAll('.task input')].map((e) => e.checked)") == [True, False]
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
    page.browser("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
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
    assert count(page, "#thread :is(script, img, iframe, style, object, embed, form, svg:not([aria-hidden]))") == 0
    handlers = "[...document.querySelectorAll('#thread *')].flatMap((e) => e.getAttributeNames().filter((n) => n.startsWith('on')))"
    assert page.js(handlers) == []
    hosts = set(page.js("[...document.querySelectorAll('#thread a')].map((a) => new URL(a.href).host)"))
    assert hosts == {"evil.example", "good.example"}  # addresses somebody may choose to follow
    assert "<script>window.pwned = 1</script>" in text(page, ANSWER)
    assert "<img src=x onerror=pwned=1>" in text(page, ANSWER)
    asked = {event["request"]["url"] for event in page.events("Network.requestWillBeSent")}
    assert all(url.startswith((server.url, "data:image/svg")) for url in asked), asked


@pytest.mark.parametrize(
    "part",
    ["[", "![", "> ", "*a ", "**a_b ", "- " * 40 + "x\n", "`" * 3 + " ", "\\(", "$$\n", "<https://a", "| a | b |\n|---|---|\n", "a* _b "],
)
def test_hostile_text_does_not_freeze_the_page(page: Page, server: FakeOpenAI, part: str) -> None:
    hostile = part * (20_000 // len(part))
    server.reply = lambda body: [piece(hostile), piece(finish="stop")]
    started = time.monotonic()
    ask(page, "?")
    assert time.monotonic() - started < 3
    depth = "(() => { let most = 0; const walk = (e, d) => { most = Math.max(most, d); for (const c of e.children) walk(c, d + 1); }; walk(document.querySelector('#thread'), 0); return most; })()"
    assert page.js(depth) < 80


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
    ask(page, "count", until="document.querySelector('.meter b') && !document.querySelector('#stop').hidden")
    live = text(page, ".meter")
    assert "12 tokens" in live and "75 % of 8 drafts accepted" in live
    rate = float(text(page, ".meter b"))
    assert 10 < rate < 40  # ten tokens after the first two, in about half a second
    more.set()
    page.wait(DONE)
    final = text(page, ".meter")
    assert "22 tokens" in final and "75 % of 16 drafts accepted" in final and "first after" in final
    assert server.received[0]["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


# --- what goes wrong --------------------------------------------------------------------------------


def endless(body: dict[str, Any]) -> Iterator[Chunk]:
    for number in itertools.count():
        yield piece(f"{number} ")
        time.sleep(0.01)


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


# --- conversations ----------------------------------------------------------------------------------


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
    assert page.js("Object.keys(localStorage).filter((k) => k.startsWith('fathom.chat.')).length") == 1
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


def test_settings_are_sent_and_kept(page: Page, server: FakeOpenAI) -> None:
    page.click("#open-settings")
    wanted = {"temperature": "0.3", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "max_tokens": "64", "repetition_penalty": "1.1", "presence_penalty": "0.2", "frequency_penalty": "-0.1", "seed": "11"}
    fill = "((id, value) => {{ const f = document.getElementById(id); f.value = value; f.dispatchEvent(new Event('input')); }})({}, {})"
    for name, value in wanted.items():
        page.js(fill.format(json.dumps(f"set-{name}"), json.dumps(value)))
    page.js(fill.format('"set-system"', '"Be brief."'))
    page.js(fill.format('"set-stop"', json.dumps("END\n\\n\\n")))
    page.js(fill.format('"set-top_k"', '"2.5"'))  # not a whole number: not taken
    page.js("document.querySelector('[name=thinking][value=on]').click()")
    page.press("Escape")
    page.reload()
    page.wait("document.querySelector('.tries')")
    ask(page, "?")
    sent = server.received[-1]
    assert {name: sent[name] for name in wanted} == {name: json.loads(value) for name, value in wanted.items()}
    assert sent["stop"] == ["END", "\n\n"]
    assert sent["chat_template_kwargs"] == {"thinking": True}
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    page.click("#open-settings")
    page.click(".settings > button")
    page.press("Escape")
    ask(page, "??", until="document.querySelectorAll('.answer').length == 2 && " + DONE)
    assert set(server.received[-1]) == {"path", "model", "messages", "stream", "stream_options"}


def test_texts_are_continued(page: Page, server: FakeOpenAI) -> None:
    server.reply = lambda body: [text_piece(" there was"), text_piece(" a <b>ship", "length"), {"choices": [], "usage": usage(5)}]
    page.click("[name=mode][value=text]")
    page.wait("document.querySelector('#say').placeholder.includes('beginning')")
    ask(page, "Once upon a time,")
    first = server.received[-1]
    assert first["path"] == "/v1/completions" and first["prompt"] == "Once upon a time,"
    assert first["max_tokens"] == 200 and "messages" not in first
    assert text(page, ".text") == "Once upon a time, there was a <b>ship"
    assert text(page, ".text .made") == " there was a <b>ship".strip()
    page.js("document.querySelector('#say').focus()")
    page.press("Enter")  # nothing written: go on
    page.wait("document.querySelectorAll('.text .made').length == 2 && " + DONE)
    assert server.received[-1]["prompt"] == "Once upon a time, there was a <b>ship"
    page.click(".icon[aria-label='Another continuation']")
    page.wait("document.querySelector('.which')?.innerText == '2 / 2'")
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
    page.js("(() => { const m = document.querySelector('#model'); m.value = 'two'; m.dispatchEvent(new Event('change')); })()")
    ask(page, "?")
    assert server.received[-1]["model"] == "two"
    page.close()


# --- who reads it -----------------------------------------------------------------------------------


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
        seen.add(page.js("document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"))
        outline = page.js("(() => { const e = document.activeElement; const s = getComputedStyle(e.matches('.segments input') ? e.nextElementSibling : e.id == 'say' ? e.parentElement : e); return s.outlineStyle != 'none' || s.boxShadow != 'none'; })()")
        assert outline or page.js("document.activeElement === document.body"), page.js("document.activeElement.outerHTML")
    assert {"Settings", "Answer again", "Edit and send again", "Copy as Markdown", "Conversation"} <= seen


@pytest.mark.parametrize("width", [320, 390])
def test_on_a_phone(page: Page, server: FakeOpenAI, width: int) -> None:
    page.resize(width, 700, phone=True)
    fits = "document.documentElement.scrollWidth <= innerWidth && document.querySelector('#thread').scrollWidth <= innerWidth"
    assert page.js(fits)
    server.reply = lambda body: say(MARKDOWN + "\n" + "x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n", 200)
    ask(page, "a" * 200)
    assert page.js(fits)
    inside = "[...document.querySelectorAll('.answer *')].filter((e) => !e.closest('pre, .wide, .unseen') && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML)"
    assert page.js(inside) == []
    hidden = "getComputedStyle(document.querySelector('#sidebar')).visibility == 'hidden'"
    assert page.js(hidden)
    page.click("#open-sidebar")
    page.wait("document.querySelector('#sidebar').getBoundingClientRect().left == 0")
    assert page.js("document.activeElement.id") == "close-sidebar"
    page.press("Escape")
    page.wait(hidden)
    page.click("#open-settings")
    page.wait("document.querySelector('#settings').open")
    assert page.js("document.querySelector('#settings').scrollWidth <= innerWidth")
    targets = "[...document.querySelectorAll('.bar button, .go, .acts .icon')].filter((e) => e.offsetWidth).every((e) => e.offsetWidth >= 24 && e.offsetHeight >= 24)"
    assert page.js(targets)


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
    server.reply = lambda body: [piece(reasoning="hm"), *say(MARKDOWN), {"error": {"message": "no", "code": "x"}}]
    ask(page, "contrast?")
    page.js("document.querySelector('.reasoning').open = true")
    assert page.js(CONTRAST) == []


CONTRAST = """(() => {
  const context = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d', {willReadFrequently: true});
  const over = (colour, below) => {
    context.fillStyle = `rgb(${below.join(' ')})`; context.fillRect(0, 0, 1, 1);
    context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const behind = (element) => {
    if (!element) return [255, 255, 255];
    return over(getComputedStyle(element).backgroundColor, behind(element.parentElement));
  };
  const light = (rgb) => { const [r, g, b] = rgb.map((v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility({visibilityProperty: true}) || element.closest('script, style, .unseen, .skip, :disabled, #toast')) continue;
    const below = behind(element), above = over(getComputedStyle(element).color, below);
    const [a, b] = [light(above), light(below)].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) low.push([node.data.slice(0, 40), (a + .05) / (b + .05)]);
  }
  return low;
})()"""


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
    page.wait("(() => { const s = document.querySelector('#scroll'); return s.scrollTop + s.clientHeight > s.scrollHeight - 5; })()")
    page.js("document.querySelector('#scroll').scrollTop = 100")
    page.wait("!document.querySelector('#latest').hidden")
    go_on.set()
    page.wait(DONE)
    assert page.js("document.querySelector('#scroll').scrollTop") == 100
    page.click("#latest")
    page.wait("document.querySelector('#latest').hidden")
