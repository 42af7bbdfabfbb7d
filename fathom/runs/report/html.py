"""Pieces of HTML that the report's sections are made of; text from the run is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from fathom.runs.report.data import Line


def framed(svg: str, caption: str, wide: bool = False) -> str:
    """A figure with its caption; a wide one may be moved sideways on a small screen."""
    shape = ' class="wide"' if wide else ""
    return f"<figure><div{shape}>{svg}</div><figcaption>{caption}</figcaption></figure>"


def details(name: str, remark: str, content: str, unfolded: bool = False) -> str:
    """Something that is folded away until it is asked for."""
    summary = f"<summary>{name} <span>· {remark}</span></summary>"
    opened = " open" if unfolded else ""
    return f'<details{opened}>{summary}<div class="scroll">{content}</div></details>'


def facts_table(facts: Line) -> str:
    """Two columns: what, and its value."""
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in flat(facts)
    )
    return f"<table>{rows}</table>"


def flat(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """(dotted name, text) of every leaf of nested dictionaries; lists become one text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list):
        yield prefix, ", ".join(map(str, value)) or "none"
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        yield prefix, f"{value:,}"
    else:
        yield prefix, str(value)


def rows_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a heading for each column."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="rows"><tr>{head}</tr>{body}</table></div>'
