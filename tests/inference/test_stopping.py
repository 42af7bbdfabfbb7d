"""Stop texts: found wherever tokens cut them, never shown, never half shown."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data.text_stream import TextStream
from fathom.inference.stopping import Spoken


def said(text: str, cuts: list[int], stops: list[str]) -> tuple[Spoken, list[str]]:
    """`text` pushed in parts, one "token" each."""
    bounds = [0, *sorted(set(cuts)), len(text)]
    parts = [text[a:b] for a, b in pairwise(bounds)]
    spoken = Spoken(TextStream(lambda ids: "".join(parts[i] for i in ids)), stops)
    shown = []
    for number in range(len(parts)):
        shown.append(spoken.push(number))
        if spoken.stopped_by is not None:
            break
    shown.append(spoken.end())
    return spoken, shown


WORDS = st.text("abc", max_size=30)


@given(WORDS, st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
@settings(max_examples=300, deadline=None)
def test_the_text_up_to_the_first_stop(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=10))
    spoken, shown = said(text, cuts, stops)
    assert "".join(shown) == spoken.shown
    assert not any(stop in spoken.shown for stop in stops)
    assert text.startswith(spoken.shown)
    if spoken.stopped_by is None:
        assert spoken.shown == text and not any(stop in text for stop in stops)
    else:
        assert text[len(spoken.shown) :].startswith(spoken.stopped_by)


def test_what_may_become_a_stop_is_held_back() -> None:
    spoken, shown = said("one END", [4, 5, 6], ["END"])
    assert shown == ["one ", "", "", "", ""] and spoken.stopped_by == "END"
    spoken, shown = said("one ENOUGH", [4, 5, 6, 7], ["END"])
    assert shown == ["one ", "", "", "ENO", "UGH", ""] and spoken.stopped_by is None


def test_an_end_that_could_have_become_a_stop_is_shown() -> None:
    _, shown = said("one EN", [4], ["END"])
    assert shown == ["one ", "", "EN"]
