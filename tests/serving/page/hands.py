"""What a user does with the page and sees on it, and a text with everything that Markdown has."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

from tests.serving.page.chromium import Page
from tests.serving.page.fake_openai import Chunk, piece

ANSWER = ".answer > .prose"
DONE = "document.querySelector('.answer') && document.querySelector('#stop').hidden"


def ask(page: Page, text: str, until: str = DONE) -> None:
    """Write a message, send it, wait."""
    page.js("document.querySelector('#say').focus()")
    page.type(text)
    page.press("Enter")
    page.wait(until)


def text(page: Page, selector: str) -> str:
    return page.js(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")


def texts(page: Page, selector: str) -> list[str]:
    return page.js(
        f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.innerText)"
    )


def count(page: Page, selector: str) -> int:
    return page.js(f"document.querySelectorAll({json.dumps(selector)}).length")


def endless(body: dict[str, Any]) -> Iterator[Chunk]:
    """An answer that goes on until its reader leaves."""
    for number in itertools.count():
        yield piece(f"{number} ")
        time.sleep(0.01)


MARKDOWN = """# Tides

The *moon* pulls, the __sun__ helps, ~~nothing~~ `else` does; snake_case_name stays, 2 * 3 * 4 too.
See in
1986. [a page](https://example.org/tides "title") and https://example.org/moon.

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
