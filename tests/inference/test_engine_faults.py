"""What is damaged or interrupted hurts nobody else, and leaves nothing behind."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import pytest
import torch

from fathom.inference import Engine, Sampling
from tests.inference.engines import model_of, nothing_is_left


@pytest.mark.parametrize("always", [True, False])
def test_modules_never_read_what_they_did_not_write(always: bool) -> None:
    """Memory for the cache comes as it is: what is in it must not be taken for entries."""
    rng, model = random.Random(1), model_of("v3")
    engine = Engine(model, block_size=4, max_requests=3)
    if always:
        engine.payoff = None
    for layer in engine.pages.layers:
        layer.fill_(float("nan"))
    wish = Sampling(0.0, max_new_tokens=25, ignore_eos=True)
    shared = [rng.randrange(2, 101) for _ in range(30)]
    for _ in range(3):
        begins = [[*shared[: rng.randint(1, 30)], rng.randrange(2, 101)] for _ in range(4)]
        outputs = list(engine.generate(begins, wish))
        further = [o.prompt_ids + o.token_ids[: rng.randint(1, 20)] for o in outputs]
        list(engine.generate(further, wish))
    assert engine.drafter is not None
    for block in engine.drafter._covered:
        for layer in engine.pages.layers:
            assert layer[block * 4 : block * 4 + 4].isfinite().all()


@torch.no_grad()
def test_modules_that_are_damaged_stop_nothing() -> None:
    model = model_of("v3")
    wish = Sampling(0.0, max_new_tokens=6, ignore_eos=True)
    expected = next(Engine(model, speculate=0).generate([[5, 6]], wish)).token_ids
    model.model.mtp[0].eh_proj.weight.fill_(float("nan"))
    engine = Engine(model, always_speculate=True)
    assert next(engine.generate([[5, 6]], wish)).token_ids == expected


@pytest.mark.parametrize("where", ["_accept", "_publish", "_end", "_draft"])
@pytest.mark.parametrize("call", [1, 2, 3, 7, 10])
def test_after_an_interruption_anywhere_the_engine_goes_on(
    where: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model_of("v3"), block_size=4, max_requests=2, always_speculate=True)
    before, calls = getattr(engine, where), 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return before(*args)

    monkeypatch.setattr(engine, where, interrupted)
    wishes = [Sampling(0.0, max_new_tokens=1 + k, ignore_eos=True) for k in range(4)]
    requests = [engine.add([5, 6, 7 + k], wish)[0] for k, wish in enumerate(wishes)]
    for _ in range(40):
        with suppress(KeyboardInterrupt):
            engine.step()
    nothing_is_left(engine)
    assert [len(request.answer) for request in requests] == [1, 2, 3, 4]


@pytest.mark.parametrize("few", [True, False])
@torch.no_grad()
def test_a_request_without_numbers_ends_alone(few: bool) -> None:
    model = model_of("v3")
    wish = Sampling(0.0, max_new_tokens=10, ignore_eos=True)
    expected = next(Engine(model).generate([[5, 6, 7]], wish)).token_ids
    model.model.embed_tokens.weight[50] = float("nan")
    engine = Engine(model, block_size=4)
    engine.few = engine.few if few else None
    good, bad = engine.generate([[5, 6, 7], [8] * 9 + [50]], wish)
    assert good.token_ids == expected
    assert bad.finish_reason == "error" and "not finite" in str(bad.stopped_by)
    nothing_is_left(engine)
    assert next(engine.generate([[50]], wish)).finish_reason == "error"


@torch.no_grad()
def test_a_draft_without_numbers_is_only_a_wrong_one() -> None:
    model = model_of("v3")
    wish = Sampling(0.0, max_new_tokens=12, ignore_eos=True)
    expected = next(Engine(model, speculate=0).generate([[5, 6, 7]], wish)).token_ids
    never = next(token for token in range(2, 101) if token not in expected)
    model.model.embed_tokens.weight[never] = float("nan")
    engine = Engine(model, always_speculate=True)
    (request,) = engine.add([5, 6, 7], wish)
    while engine.busy:
        engine.step()
        request.drafts = [never for _ in request.drafts]
    assert request.answer == expected
    nothing_is_left(engine)
