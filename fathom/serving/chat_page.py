"""The chat page at /, and the policy under which a browser runs it.

`page/index.html` is served as it stands; nothing builds it. Its script and its style are inside it, so the policy names
both by their SHA-256 and allows no other: text of a model that reached the page as HTML could neither run nor load
anything.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files


@cache
def page() -> bytes:
    """The page, UTF-8, with line feeds alone, as browsers hash it."""
    content = (files("fathom.serving") / "page" / "index.html").read_bytes()
    return content.replace(b"\r\n", b"\n")


@cache
def headers() -> dict[str, str]:
    """HTTP headers that belong to it."""
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy(page()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def policy(html: bytes) -> str:
    """A Content-Security-Policy for a page with its script and style inside, which talks to its own server alone.

    Trusted Types are required and none is allowed, so not even the page's own script can turn text into HTML.
    """
    rules = {
        "default-src": "'none'",
        "script-src": _hashes(html, b"script"),
        "style-src": _hashes(html, b"style"),
        "img-src": "data:",  # its icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hashes(html: bytes, tag: bytes) -> str:
    contents = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), html, re.DOTALL)
    digests = [hashlib.sha256(content).digest() for content in contents]
    return " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests) or "'none'"
