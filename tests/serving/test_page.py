"""The chat page as a text: one valid file that needs nothing from elsewhere and makes no HTML of what a model says."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from tests.serving.page.fake_openai import PAGE

VOID = {"meta", "link", "input", "br", "hr", "img"}
SELF_CLOSING = {"path", "circle", "rect", "use"}
HTML = PAGE.read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Elements of the page; complains where tags do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in {self.get_starttag_text()}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            assert tag not in SELF_CLOSING, f"<{tag}> at {self.getpos()} is not closed"
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SELF_CLOSING, f"<{tag}/> at {self.getpos()} is no element that closes itself"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()} closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data


@pytest.fixture(scope="module")
def outline() -> Outline:
    parser = Outline()
    parser.feed(HTML)
    parser.close()
    return parser


def test_tags_match_and_identifiers_are_single(outline: Outline) -> None:
    assert HTML.lower().startswith("<!doctype html>")
    assert outline.open == []
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [tag for tag, _ in outline.elements].count("script") == 1


def test_what_is_referred_to_is_there(outline: Outline) -> None:
    """Labels, controls and icons, and the elements that the script looks for."""
    ids = {attributes["id"] for _, attributes in outline.elements if "id" in attributes}
    for _, attributes in outline.elements:
        for name in ("for", "aria-controls", "aria-labelledby"):
            assert attributes.get(name) is None or attributes[name] in ids
        if (attributes.get("href") or "").startswith("#i-"):
            assert attributes["href"][1:] in ids
    script = outline.texts["script"]
    assert set(re.findall(r'\$\("([\w-]+)"\)', script)) <= ids
    assert {f"i-{name}" for name in re.findall(r'\bicon(?:Button)?\("(\w+)"', script)} <= ids


def test_buttons_and_fields_have_names(outline: Outline) -> None:
    named = ("aria-label", "aria-labelledby", "title")
    icons = [
        a for tag, a in outline.elements if tag == "button" and "icon" in (a.get("class") or "")
    ]
    fields = [a for tag, a in outline.elements if tag in ("textarea", "select", "input")]
    assert icons and fields
    for attributes in icons + fields:
        assert any(attributes.get(name) for name in named), attributes


def test_nothing_comes_from_elsewhere(outline: Outline) -> None:
    for tag, attributes in outline.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    assert not re.search(r"@import|url\(", outline.texts["style"])
    addresses = set(re.findall(r"https?://[\w.]+", HTML))
    assert addresses == {"http://www.w3.org"}  # the name of SVG, which nobody fetches
    calls = re.findall(r'\bask\("?([^",)]+)', outline.texts["script"])
    assert calls == ["path", "v1/models", "path"]
    assert set(re.findall(r'"(v\d/[\w/]+)"', HTML)) == {
        "v1/models",
        "v1/completions",
        "v1/chat/completions",
    }


def test_no_text_becomes_html_or_code(outline: Outline) -> None:
    ways = (
        "innerHTML|outerHTML|insertAdjacentHTML|setHTML|setHTMLUnsafe|createContextualFragment|DOMParser"
        "|srcdoc|write|writeln|eval|Function|import"
    )
    assert not re.findall(rf"\b(?:{ways})\s*[(=]", outline.texts["script"])
    assert "innerHTML" not in HTML


def test_a_strict_policy_is_enough(outline: Outline) -> None:
    for tag, attributes in outline.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
    assert 'setAttribute("style"' not in HTML


def test_it_is_small() -> None:
    assert len(HTML.encode()) < 100_000
