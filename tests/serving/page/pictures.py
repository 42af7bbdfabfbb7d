"""Pictures of the chat page: `python -m tests.serving.page.pictures FOLDER`.

A script plays the model; its figures mean nothing.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.serving.page import chromium
from tests.serving.page.chromium import Chromium, Page
from tests.serving.page.fake_openai import Chunk, FakeOpenAI, Refusal, piece, text_piece, usage

DESKTOP, PHONE = (1280, 800), (390, 844)
EARLIER = (
    "A name for a small sailing boat",
    "Merge two sorted lists in Python",
    "What does a router of experts learn?",
)
QUESTION = "Why are there two tides a day, if the moon passes overhead only once?"
REASONING = (
    "The reader expects one tide for each passage of the moon. The key is that the pull gets weaker with distance, "
    "so what matters is the *difference* across the Earth, and that difference is symmetric: towards the moon on the "
    "near side, away from it on the far side."
)
ANSWER = """\
Because tides come from the **difference** of the moon's pull across the Earth, and a difference has two sides.

- On the *near* side the moon pulls the water more than it pulls the Earth, and the water bulges towards it.
- On the *far* side it pulls the water less than the Earth, and the water is left behind.

The Earth turns under both bulges once a day, so most coasts meet two high tides, about 12 hours and 25 minutes apart.

| body | pull on the Earth | tide |
|:-----|------------------:|-----:|
| moon |            1 | 1    |
| sun  |          178 | 0.46 |

The last column falls with the *cube* of the distance, which is why the near moon wins:

```python
def tide(mass: float, distance: float) -> float:
    # what is left of the pull when the pull on the centre is taken away
    return 2 * G * mass * RADIUS / distance**3
```

Where coasts stand in the way, as in the Gulf of Mexico, one of the two can be lost.
"""


class Script:
    """Says the answer in pieces; holds after `hold` characters until `go` is set, or breaks off there."""

    def __init__(self) -> None:
        self.hold: int | None = None
        self.breaks = False
        self.go = threading.Event()

    def __call__(self, body: dict[str, Any]) -> Iterator[Chunk]:
        if "prompt" in body:
            yield from self._text()
            return
        counts = iter(range(3, 10**6, 2))
        for part in _pieces(REASONING):
            yield self._count(piece(reasoning=part), next(counts))
        for at, part in enumerate(_pieces(ANSWER)):
            if self.hold is not None and at * 9 > self.hold:
                if self.breaks:
                    yield {
                        "error": {
                            "message": "the engine ran out of memory and gave this answer up; others go on",
                            "type": "server_error",
                            "code": None,
                        }
                    }
                    return
                self.go.wait(60)
            yield self._count(piece(part), next(counts))
        yield piece(finish="stop")

    def _text(self) -> Iterator[Chunk]:
        for part in _pieces(
            " there lived an old man who counted the waves. He had counted them since he was a boy, and"
            " he knew that every seventh was larger than the others, though nobody believed him."
        ):
            time.sleep(0.01)
            yield text_piece(part)
        yield {"choices": [], "usage": usage(40, 16, 5)}

    def _count(self, chunk: Chunk, tokens: int) -> Chunk:
        time.sleep(0.012)
        return {**chunk, "usage": usage(tokens, tokens * 41 // 100, tokens * 9 // 100)}


def _pieces(text: str) -> list[str]:
    return [text[at : at + 9] for at in range(0, len(text), 9)]


class Studio:
    """A browser, a server and a folder."""

    def __init__(self, browser: Chromium, server: FakeOpenAI, folder: Path) -> None:
        self.browser, self.server, self.folder = browser, server, folder

    def page(self, size: tuple[int, int], scheme: str) -> Page:
        """A page that already has a few conversations."""
        page = Page(self.browser)
        page.resize(*size, phone=size == PHONE)
        page.prefer(prefers_color_scheme=scheme)
        page.go(self.server.url)
        page.wait("document.querySelector('.tries')")
        self.server.reply = lambda body: [piece("Gladly."), piece(finish="stop")]
        for title in EARLIER:
            self.say(
                page,
                title,
                "document.querySelector('#stop').hidden && document.querySelector('.answer')",
            )
            page.js("document.querySelector('#new').click()")
        return page

    def say(self, page: Page, text: str, until: str) -> None:
        page.js("document.querySelector('#say').focus()")
        page.type(text)
        page.press("Enter")
        page.wait(until, 30)

    def save(self, page: Page, name: str) -> None:
        time.sleep(0.4)
        path = self.folder / f"chat-{name}.png"
        page.picture(path)
        print(f"{path}  {path.stat().st_size / 1000:.0f} KB")

    def stream(
        self,
        name: str,
        size: tuple[int, int],
        scheme: str,
        hold: int | None,
        act: str = "",
        end: bool = True,
    ) -> None:
        """The conversation, held after `hold` characters or finished."""
        script, page = Script(), self.page(size, scheme)
        self.server.reply, script.hold = script, hold
        shown = (
            f"document.querySelector('.answer > .prose')?.innerText.length > {(hold or 900) * 0.75}"
        )
        self.say(
            page,
            QUESTION,
            shown
            if hold
            else "document.querySelector('#stop').hidden && document.querySelector('.answer')",
        )
        page.js(act or "0")
        if not end:
            page.js("document.querySelector('#scroll').scrollTop = 0")
        self.save(page, name)
        script.go.set()
        page.close()

    def error(self, name: str, size: tuple[int, int], scheme: str) -> None:
        """An answer that broke off."""
        script, page = Script(), self.page(size, scheme)
        self.server.reply, script.hold, script.breaks = script, 430, True
        self.say(page, QUESTION, "document.querySelector('.fault')")
        self.save(page, name)
        page.close()

    def refusal(self, name: str, size: tuple[int, int], scheme: str) -> None:
        """A request that was refused."""

        def refuse(body: dict[str, Any]) -> list[Chunk]:
            raise Refusal(
                429,
                "256 answers are running or waiting, which is all this server takes; try again later",
                {"Retry-After": "4"},
                code="rate_limit_exceeded",
            )

        page = self.page(size, scheme)
        self.server.reply = refuse
        self.say(page, QUESTION, "document.querySelector('.fault')")
        self.save(page, name)
        page.close()

    def text(self, name: str, size: tuple[int, int], scheme: str) -> None:
        """A text that is continued."""
        page = self.page(size, scheme)
        self.server.reply = Script()
        page.js("document.querySelector('[name=mode][value=text]').click()")
        self.say(
            page,
            "Once upon a time, in a house by the sea,",
            "document.querySelector('#stop').hidden && document.querySelector('.made')",
        )
        self.save(page, name)
        page.close()

    def still(self, name: str, size: tuple[int, int], scheme: str, act: str) -> None:
        """The empty page after some script."""
        page = self.page(size, scheme)
        page.js(act)
        self.save(page, name)
        page.close()


def take(studio: Studio) -> None:
    """All pictures; the first four are those of the documentation."""
    studio.stream("desktop-light", DESKTOP, "light", 800)
    studio.stream(
        "desktop-dark",
        DESKTOP,
        "dark",
        None,
        end=False,
        act="document.querySelector('.reasoning').open = true",
    )
    studio.stream("phone-light", PHONE, "light", 560)
    studio.error("phone-dark-error", PHONE, "dark")
    if "--all" not in sys.argv:
        return
    for scheme in ("light", "dark"):
        for size, kind in ((DESKTOP, "desktop"), (PHONE, "phone")):
            end = f"{kind}-{scheme}"
            studio.still(f"empty-{end}", size, scheme, "0")
            studio.still(
                f"settings-{end}", size, scheme, "document.querySelector('#open-settings').click()"
            )
            studio.text(f"text-{end}", size, scheme)
            studio.refusal(f"refused-{end}", size, scheme)
            studio.stream(f"start-{end}", size, scheme, 60)
            studio.stream(f"code-{end}", size, scheme, None)
            studio.still(
                f"list-{end}", size, scheme, "document.querySelector('#open-sidebar').click()"
            )


def main() -> None:
    folder = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as profile:
        browser, server = Chromium(chromium.find() or "chromium", Path(profile)), FakeOpenAI()
        try:
            take(Studio(browser, server, folder))
        finally:
            browser.close()
            server.shutdown()


if __name__ == "__main__":
    main()
