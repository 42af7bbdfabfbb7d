"""Forms that begin behind a text, such as the end of the reasoning."""

from __future__ import annotations

import json
import re

import pytest

from fathom.data import Tokenizer
from fathom.inference import Guide, Sampling
from fathom.inference.guided import Grammars
from tests.inference.guides import (
    CHOICE,
    ROWS,
    WORDS,
    allowed,
    ask,
    engine,
    guided,
    id_of,
    spelled,
    tokenizer,
)

YES = Guide("regex", "yes|no", after="</think>")


def test_the_end_of_the_prompt_begins_the_form() -> None:
    for prompt in ("<think> alpha </think>", "</think>\n\n", [{"role": "user", "content": "x"}]):
        chat = not isinstance(prompt, str)
        output = ask(
            Guide("regex", "yes|no", after="<｜Assistant｜>" if chat else "</think>"), prompt
        )
        assert output.text in ("yes", "no")


@pytest.mark.parametrize("prompt", ["yes", "</think> yes", "<think>"])
def test_nothing_is_masked_while_the_reasoning_goes_on(prompt: str) -> None:
    wish = {"seed": 5, "max_new_tokens": 40, "ignore_eos": True}
    free = next(engine().generate([prompt], Sampling(1.0, **wish)))
    held = ask(YES, prompt, **wish)
    assert held.token_ids == free.token_ids and "</think>" not in (free.text or "")


def said_in(*pieces: str) -> list[int]:
    """Each piece letter by letter if it is no token of its own."""
    ids: list[int] = []
    for piece in pieces:
        found = tokenizer().encode(piece)
        ids += found if len(found) == 1 else [id_of(letter) for letter in piece]
    return ids


@pytest.mark.parametrize(
    "pieces", [("</think>",), ("<", "/", "t", "hink", ">"), ("x<", "</", "think", ">")]
)
def test_the_form_begins_behind_the_text_in_whatever_tokens_it_comes(
    pieces: tuple[str, ...],
) -> None:
    ids = said_in(*pieces)
    state = guided(YES)
    for place, token in enumerate(ids):
        mask = state.allowed()
        assert mask is None or bool(mask[token])
        assert set(allowed(state, ids[place:])) == spelled("", ["yes", "no"])
        state.advance(token)
    assert allowed(state) == spelled("", ["yes", "no"])
    for token in tokenizer().encode("no"):
        state.advance(token)
    assert state.complete


def test_a_text_begun_by_the_prompt_is_ended_by_the_answer() -> None:
    state = guided(YES, "alpha </thi")
    for token in said_in("nk", ">"):
        assert state.seen is not None
        state.advance(token)
    assert state.seen is None and allowed(state) == spelled("", ["yes", "no"])


def test_no_token_says_the_end_of_the_text_and_more_at_once() -> None:
    mark = 'e"'  # `":` and others go on behind it
    state = guided(Guide("regex", "yes|no", after=mark))
    state.advance(id_of("e"))
    mask = state.allowed()
    assert mask is not None
    longer = {t for t in range(WORDS) if re.match('".', tokenizer().decode([t]), re.DOTALL)}
    inside = {t for t in range(WORDS) if re.search('e".', tokenizer().decode([t]), re.DOTALL)}
    assert longer and set((~mask).nonzero()[:, 0].tolist()) == longer | inside


def test_the_answer_says_the_text_itself() -> None:
    """What the model says of its own accord is taken for the text; the form begins behind it."""
    wish = {"max_new_tokens": 40, "ignore_eos": True}
    begun = 0
    for seed in range(6):
        free = next(engine().generate(["yes"], Sampling(1.0, seed=seed, **wish)))
        place, mark = own_words(free.token_ids)
        if not mark:
            continue
        held = ask(Guide("regex", CHOICE, after=mark), seed=seed, **wish)
        assert held.token_ids[:place] == free.token_ids[:place]
        assert tokenizer().decode(held.token_ids[place:]) in CHOICE.split("|")
        assert held.finish_reason == "stop"
        begun += 1
    assert begun > 2


def own_words(ids: list[int]) -> tuple[int, str]:
    """A text of two tokens that the answer says, where it ends, and that it has not said before."""
    for place in range(5, 15):
        mark = tokenizer().decode(ids[place - 2 : place])
        before = tokenizer().decode(ids[: place - 1])
        if mark.isascii() and mark.isprintable() and len(mark) > 1 and mark not in before:
            return place, mark
    return 0, ""


def test_a_control_token_can_be_the_text() -> None:
    definition = json.loads(tokenizer().definition)
    definition["added_tokens"].append(
        {**definition["added_tokens"][0], "id": WORDS, "content": "</think>", "special": False}
    )
    known = Tokenizer(json.dumps(definition), tokenizer().settings)
    grammars = Grammars(known, ROWS)
    (state,) = grammars.begin(YES, known.encode("yes"), frozenset({1}))
    state.advance(known.control_id("</think>"))
    assert allowed(state) == spelled("", ["yes", "no"])
    prompt = [*known.encode("yes"), known.control_id("</think>")]
    (begun,) = grammars.begin(YES, prompt, frozenset({1}))
    assert allowed(begun) == spelled("", ["yes", "no"])
    (anything,) = grammars.begin(Guide("regex", "(?s:.*)"), [5], frozenset({1}))
    assert known.control_id("</think>") not in allowed(anything)
