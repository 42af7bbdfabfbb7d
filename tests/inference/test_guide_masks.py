"""What a form allows next, behind drafts too, and that the rest keeps the model's own proportions."""

from __future__ import annotations

import pytest
import torch

from fathom.inference import Engine, Guide, Request, Sampling
from tests.inference.chi_square import fits
from tests.inference.guides import (
    CHOICE,
    ROWS,
    WORDS,
    allowed,
    ask,
    continues,
    engine,
    guided,
    id_of,
    model,
    spelled,
    tokenizer,
)


@pytest.mark.parametrize(
    "words", [["a", "b", "cc"], ["yes", "no"], ["1", "12", "123"], ["日", "日本", "x"]]
)
def test_exactly_the_tokens_that_continue_a_valid_text_are_allowed(words: list[str]) -> None:
    state = guided(Guide("regex", "|".join(words)))
    found = allowed(state)
    whole = {token for token in found if "\ufffd" not in tokenizer().decode([token])}
    assert whole == spelled("", words)
    assert all(tokenizer().decode([token]) == "\ufffd" for token in found - whole)


def test_rows_that_the_tokenizer_does_not_have_are_never_allowed() -> None:
    state = guided(Guide("regex", "(?s:.*)"))
    assert allowed(state) & set(range(WORDS, ROWS)) == set()
    assert tokenizer().eos_id in allowed(state)
    huge = dict.fromkeys(range(WORDS, ROWS), 90.0)
    output = ask(Guide("regex", "(?s:.{5,9})"), logit_bias=huge)
    assert max(output.token_ids) < WORDS


def test_masks_behind_drafts_are_those_of_the_text_with_them() -> None:
    state, ids = guided(Guide("regex", CHOICE)), [id_of(letter) for letter in "alter"]
    for place in range(len(ids)):
        for count in range(len(ids) - place):
            fresh = guided(Guide("regex", CHOICE))
            for token in ids[: place + count]:
                fresh.advance(token)
            assert allowed(state, ids[place : place + count]) == allowed(fresh)
        assert state.allowed(ids[place:]) is None  # nothing follows
        state.advance(ids[place])
        assert state.complete == (place == len(ids) - 1)
    assert state.failure is None


def test_nothing_matters_behind_drafts_that_end_or_leave_the_form() -> None:
    state = guided(Guide("regex", "a+"))
    assert state.allowed([id_of("a"), tokenizer().eos_id]) is None
    assert state.allowed([id_of("b")]) is None
    assert tokenizer().eos_id in allowed(state, [id_of("a")])
    assert tokenizer().eos_id not in allowed(state)
    state.advance(id_of("a"))
    assert state.failure is None and not state.complete


def test_drafts_that_the_form_forbids_are_not_proposed() -> None:
    server = engine(speculate=4)
    words = CHOICE.split("|")
    wish = Sampling(1.0, n=6, seed=3, guide=Guide("regex", CHOICE), max_new_tokens=20)
    requests, proposed = server.add("yes", wish), 0
    while server.busy:
        server.step()
        for request in requests:
            if request.ended is None and request.drafts:
                assert continues(tokenizer().decode(without_end(request)), words)
                proposed += 1
    assert proposed > 3 and all(text_of(server, request) in words for request in requests)


def without_end(request: Request) -> list[int]:
    """Answer and drafts up to the first that would end it; behind that, drafts are of no use."""
    ids = request.answer + request.drafts
    guided = request.guided
    assert guided is not None
    for count in range(1, len(request.drafts) + 1):
        if guided.allowed(request.drafts[:count]) is None:
            return request.answer + request.drafts[:count]
    return ids


def text_of(server: Engine, request: Request) -> str:
    return server.output(request).text or ""


@pytest.mark.parametrize("drafts", [0, 3])
def test_the_distribution_is_the_models_renormalised_one(drafts: int) -> None:
    words, prompt = ["a", "b", "cc"], tokenizer().encode("yes no")
    guide = Guide("regex", "a|b|cc")
    wish = Sampling(1.0, n=600, seed=7, max_new_tokens=4, guide=guide)
    server = engine(max_requests=100, batch_tokens=1000, speculate=drafts)
    outputs = list(server.generate([prompt], wish))
    assert {output.text for output in outputs} <= set(words)
    counts = torch.bincount(torch.tensor([o.token_ids[0] for o in outputs]), minlength=ROWS)
    with torch.no_grad():
        logits = model()(torch.tensor([prompt]), mtp=False).logits[0, -1].double()
    within = torch.tensor([token in spelled("", words) for token in range(ROWS)])
    assert fits(counts, torch.where(within, logits.exp(), 0) / logits[within].exp().sum())
