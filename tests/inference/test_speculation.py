"""Drafts change how fast an answer comes and nothing about it: not its tokens, its distribution, its end."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

import fathom
from fathom.inference import Engine, Sampling
from fathom.inference.choice import CLOSE, Draw, probabilities
from fathom.inference.payoff import AGAIN, BUDGET, TRIALS, Payoff
from tests.inference.chi_square import fits
from tests.model.tiny import tiny_model

WISHES = {
    "plain": Sampling(1.0),
    "warm": Sampling(1.6),
    "nucleus": Sampling(0.9, top_p=0.8),
    "top-k": Sampling(1.0, top_k=4),
    "min-p": Sampling(1.0, min_p=0.1),
    "penalties": Sampling(1.0, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.5),
    "bias": Sampling(1.0, logit_bias={3: 2.0, 7: -1.0}),
}


def small(depth: int, vocabulary: int = 12, **changes: Any) -> fathom.Transformer:
    return tiny_model(
        depth, vocab_size=vocabulary, num_nextn_predict_layers=depth, **changes
    ).eval()


@pytest.mark.parametrize(
    ("depth", "wish"),
    [
        (1, "plain"),
        (2, "plain"),
        (3, "plain"),
        *((1 + i % 3, wish) for i, wish in enumerate(WISHES) if i),
    ],
)
def test_the_second_token_has_the_models_distribution(depth: int, wish: str) -> None:
    """Many requests with seeds of their own; the token after the first is checked against drafts."""
    model, prompt, count = small(depth), [4, 9, 2, 7], 2400
    engine = Engine(
        model, max_requests=200, speculate=depth + 1, always_speculate=True, batch_tokens=2000
    )
    asked = replace(WISHES[wish], max_new_tokens=depth + 3, seed=1, n=count, ignore_eos=True)
    answers = [output.token_ids for output in engine.generate([prompt], asked)]
    first = torch.bincount(torch.tensor([answer[0] for answer in answers]), minlength=12)
    likeliest = int(first.argmax())
    seconds = [answer[1] for answer in answers if answer[0] == likeliest]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, likeliest]]), mtp=False).logits[0]
    draws = [Draw(asked, 0, 0, prompt), Draw(asked, 0, 1, prompt, [likeliest])]
    expected = probabilities(logits[-2:], draws)
    assert fits(first, expected[0])
    assert fits(torch.bincount(torch.tensor(seconds), minlength=12), expected[1])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_answers_are_those_without_drafts(depth: int) -> None:
    rng, model = random.Random(depth), small(depth, 101)
    prompts = [[rng.randrange(2, 101) for _ in range(rng.randint(1, 30))] for _ in range(6)]
    wishes = [
        replace(wish, max_new_tokens=20, seed=seed, ignore_eos=True)
        for seed, wish in enumerate([Sampling(0.0), *list(WISHES.values())[:5]])
    ]
    plain = list(Engine(model, speculate=0).generate(prompts, wishes))
    for drafts in (1, depth, depth + 3):
        engine = Engine(model, speculate=drafts, always_speculate=True)
        for a, b in zip(plain, engine.generate(prompts, wishes), strict=True):
            assert a.token_ids == b.token_ids or a.usage.close_calls + b.usage.close_calls
            assert len(b.usage.drafted) <= drafts
            assert sum(b.usage.accepted) + b.usage.forwards >= len(b.token_ids)


def test_right_drafts_are_kept_and_counted() -> None:
    """A model whose MTP module is made to know the answer gives two tokens with each pass."""
    model = small(1, 101)
    plain = next(Engine(model, speculate=0).generate([[5, 6, 7]], greedy(31)))
    engine = Engine(model, speculate=1, always_speculate=True)
    knows(engine, plain.prompt_ids + plain.token_ids)
    output = next(engine.generate([[5, 6, 7]], greedy(31)))
    assert output.token_ids == plain.token_ids
    assert output.usage.drafted == output.usage.accepted == [15]
    assert output.usage.forwards == 16


def greedy(count: int, **more: Any) -> Sampling:
    return Sampling(0.0, max_new_tokens=count, ignore_eos=True, **more)


def knows(engine: Engine, ids: list[int]) -> None:
    """Let the engine's drafts be the tokens of a known text."""
    assert engine.drafter is not None

    def follow(fresh: list[Any], drafting: set[Any]) -> None:
        for request in drafting:
            most = min(engine.speculate, request.limit - len(request.ids) - 1)
            request.drafts = ids[len(request.ids) : len(request.ids) + most]

    engine.drafter.follow = follow  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("place", range(3, 9))
def test_nothing_leaks_past_a_stop(place: int) -> None:
    model = small(1, 101)
    plain = next(Engine(model, speculate=0).generate([[5, 6, 7]], greedy(30)))
    stop = plain.token_ids[place]
    until = plain.token_ids.index(stop) + 1
    engine = Engine(model, speculate=5, always_speculate=True)
    knows(engine, plain.prompt_ids + plain.token_ids)
    output = next(engine.generate([[5, 6, 7]], greedy(30, stop_token_ids=(stop,))))
    assert output.token_ids == plain.token_ids[:until]
    assert output.finish_reason == "stop" and output.stopped_by == stop
    assert output.usage.completion_tokens == until
    short = next(engine.generate([[5, 6, 7]], greedy(place)))
    assert short.token_ids == plain.token_ids[:place] and short.finish_reason == "length"
    assert engine.pool.free == engine.pool.count


@pytest.mark.parametrize(
    "changes", [{}, {"mtp_hidden": "pre_norm"}, {"mtp_concat_order": "hidden_first"}]
)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_drafts_are_what_the_modules_of_the_model_say(depth: int, changes: dict[str, str]) -> None:
    """Greedy drafts behind a text equal those of a whole pass of the model over the text and its drafts."""
    model = small(depth, 101, **changes)
    engine = Engine(model, speculate=depth, always_speculate=True, block_size=4, batch_tokens=7)
    (request,) = engine.add([8, 3, 5, 60, 33, 21, 19, 77, 2, 90], greedy(25))
    checked = 0
    while request.ended is None:
        engine.step()
        if request.ended is None and request.drafts:
            text = torch.tensor([request.ids + request.drafts])
            with torch.no_grad():
                found = model(text).mtp_logits
            for d, draft in enumerate(request.drafts, start=1):
                logits = found[d - 1][0, len(request.ids) - 2]
                best = logits.topk(2)
                close = float(best.values[0] - best.values[1]) < CLOSE
                assert draft == int(best.indices[0]) or close, (d, len(request.ids))
                checked += 1
    assert checked > 20


def drive(payoff: Payoff, passes: int, slower: float, requests: int = 1) -> list[bool]:
    """Passes that take a second for a token, or `slower` seconds for two with drafts: which drafted."""
    ways = []
    for _ in range(passes):
        ways.append(payoff.drafting(requests))
        seconds, tokens = (slower, 2) if ways[-1] else (1.0, 1)
        payoff.record(requests, ways[-1], seconds, tokens)
    return ways


@pytest.mark.parametrize("first", [False, True])
def test_drafting_stops_where_it_does_not_pay_and_is_tried_ever_more_seldom(first: bool) -> None:
    payoff = Payoff(1, drafts_first=first)
    ways = drive(payoff, 30000, slower=3.0)
    assert ways[:TRIALS] == [first] * TRIALS
    start = TRIALS if first else 0
    for end in range(100, 30000, 100):  # a second lost in each, at most a pass too many
        assert sum(ways[start:end]) <= BUDGET * end + 1
    thirds = [sum(ways[k : k + 10000]) for k in range(start, 30000 - start, 10000)]
    assert thirds[0] > max(thirds[1:]) and max(thirds[1:]) <= 3 * TRIALS and min(thirds) > 0
    assert not payoff.following(1)


@pytest.mark.parametrize("first", [False, True])
def test_drafting_goes_on_where_it_pays(first: bool) -> None:
    payoff = Payoff(2, drafts_first=first)
    ways = drive(payoff, 1000, slower=1.2)
    if not first:  # it begins when two passes are half of what trials may lose
        assert 4 / BUDGET <= ways.index(True) < 4.5 / BUDGET  # (older passes count less)
    assert all(ways[-AGAIN // 2 :]) or sum(ways[-AGAIN:]) >= AGAIN - TRIALS
    assert payoff.following(1)
    assert payoff.drafting(1, alone=False)
    assert payoff.drafting(8) == first  # another size is measured for itself


def test_a_change_of_what_pays_is_noticed() -> None:
    payoff = Payoff(1, drafts_first=False)
    assert sum(drive(payoff, 2000, slower=3.0)) < 40
    assert all(drive(payoff, 4000, slower=1.0)[-100:])
    assert not any(drive(payoff, 6000, slower=4.0)[-10:])


def test_reading_prompts_for_drafts_is_paid_from_what_drafts_gain() -> None:
    payoff = Payoff(1, drafts_first=False)
    drive(payoff, 1000, slower=1.9)  # a gain of a twentieth
    assert payoff.following(1)
    for _ in range(10):
        payoff.spend(50.0, on_drafts=10.0)  # long prompts, short answers
    assert payoff.drafting(1) and not payoff.following(1)


def test_answers_do_not_depend_on_when_drafting_is_switched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, rng = small(2, 101), random.Random(4)
    prompts = [[rng.randrange(2, 101) for _ in range(rng.randint(1, 30))] for _ in range(5)]
    wishes = [Sampling(1.0, seed=seed, max_new_tokens=25, ignore_eos=True) for seed in range(5)]
    plain = list(Engine(model, speculate=0).generate(prompts, wishes))
    engine = Engine(model, speculate=3, max_requests=3)
    assert engine.payoff is not None
    monkeypatch.setattr(engine.payoff, "drafting", lambda *_: rng.random() < 0.5)
    for a, b in zip(plain, engine.generate(prompts, wishes), strict=True):
        assert a.token_ids == b.token_ids or a.usage.close_calls + b.usage.close_calls
