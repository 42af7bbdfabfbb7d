"""The engine says what a model reading each whole text anew would say, whatever else goes on beside it."""

from __future__ import annotations

import random

import pytest
import torch

from fathom.errors import GenerationError
from fathom.inference import Engine, Sampling
from fathom.inference.choice import CLOSE
from tests.inference.engines import (
    SHAPES,
    check,
    model_of,
    nothing_is_left,
    random_prompts,
    random_wish,
    says,
    small_engine,
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_every_answer_is_the_one_given_alone(shape: str, seed: int) -> None:
    rng, model = random.Random(seed), model_of(shape, seed)
    size = rng.choice((1, 4, 7, 16))
    depth = model.config.num_nextn_predict_layers
    engine = small_engine(
        model,
        tokens=rng.choice((110, 200, 2000)),
        block_size=size,
        batch_tokens=rng.choice((5, 24, 64)),
        max_requests=rng.choice((2, 5, 8)),
        speculate=rng.choice((0, 1, depth, depth + 2)) if depth else 0,
        prefix_cache=rng.random() < 0.7,
    )
    prompts = random_prompts(rng, 8)
    wishes = [random_wish(rng) for _ in prompts]
    check(model, engine, prompts, wishes)


def test_a_text_larger_than_the_cache_is_refused_at_once() -> None:
    engine = small_engine(model_of("v3"), tokens=64, block_size=16)
    with pytest.raises(GenerationError, match="do not fit the cache of 64 tokens"):
        engine.add([5] * 60, Sampling(max_new_tokens=10))
    with pytest.raises(GenerationError, match="exceed the model's context of 128"):
        engine.add([5] * 60, Sampling(max_new_tokens=100))
    assert not engine.busy


def test_requests_push_each_other_out_and_say_the_same() -> None:
    model = model_of("v3")
    engine = small_engine(model, tokens=64, block_size=4, batch_tokens=32, prefix_cache=False)
    rng = random.Random(0)
    prompts = [[rng.randrange(2, 101) for _ in range(20)] for _ in range(4)]
    wishes = [Sampling(0.0, max_new_tokens=30, ignore_eos=True)] * 4
    outputs = list(engine.generate(prompts, wishes))
    assert sum(output.usage.preemptions for output in outputs) > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        expected, gap = says(model, prompt, wishes[0], set())
        assert output.token_ids == expected or gap < CLOSE


def test_a_second_text_finds_what_the_first_left() -> None:
    model = model_of("v3")
    engine = Engine(model, block_size=8)
    prompt = list(range(2, 60))
    wish = Sampling(0.0, max_new_tokens=5)
    first, second = (next(engine.generate([prompt], wish)) for _ in range(2))
    assert first.usage.cached_tokens == 0 and second.usage.cached_tokens == 56
    assert first.token_ids == second.token_ids
    longer = prompt + first.token_ids
    third = next(engine.generate([longer], wish))
    assert third.usage.cached_tokens == 56
    assert third.token_ids == says(model, longer, wish, {1})[0]


def test_n_answers_share_the_prompt() -> None:
    engine = Engine(model_of("v3"), block_size=8)
    wish = Sampling(1.0, n=3, seed=5, max_new_tokens=6, ignore_eos=True)
    prompt = list(range(2, 60))
    outputs = list(engine.generate([prompt], wish))
    assert [output.choice for output in outputs] == [0, 1, 2]
    assert [output.usage.cached_tokens for output in outputs] == [0, 56, 56]
    for k, output in enumerate(outputs):
        alone = Sampling(1.0, seed=5 + k, max_new_tokens=6, ignore_eos=True)
        assert next(engine.generate([prompt], alone)).token_ids == output.token_ids


def test_logprobs_of_answer_and_prompt() -> None:
    model = model_of("v3")
    engine = Engine(model, batch_tokens=16, block_size=4)
    prompt = list(range(2, 50))
    wish = Sampling(0.8, seed=3, max_new_tokens=8, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    output = next(engine.generate([prompt], wish))
    ids = prompt + output.token_ids
    with torch.no_grad():
        log_TV = model(torch.tensor([ids]), mtp=False).logits[0].log_softmax(-1)
    assert output.prompt_logprobs is not None and output.logprobs is not None
    assert output.prompt_logprobs[0] is None
    found = output.prompt_logprobs[1:] + output.logprobs
    assert len(found) == len(ids) - 1
    for place, logprob in enumerate(found, start=1):
        assert logprob is not None and logprob.token == ids[place]
        assert logprob.logprob == pytest.approx(float(log_TV[place - 1, ids[place]]), abs=1e-5)
        assert logprob.rank == 1 + int((log_TV[place - 1] > log_TV[place - 1, ids[place]]).sum())
        assert [t for t, _ in logprob.top] == log_TV[place - 1].topk(
            len(logprob.top)
        ).indices.tolist()


def test_prompt_logprobs_survive_being_put_back() -> None:
    model = model_of("v3")
    engine = small_engine(model, tokens=80, block_size=4, batch_tokens=9)
    wish = Sampling(0.0, max_new_tokens=20, prompt_logprobs=0, ignore_eos=True)
    prompts = [list(range(2 + k, 32 + k)) for k in range(3)]
    outputs = list(engine.generate(prompts, wish))
    assert sum(output.usage.preemptions for output in outputs) > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_logprobs is not None
        assert [logprob.token for logprob in output.prompt_logprobs if logprob] == prompt[1:]


def test_leaving_early_frees_everything() -> None:
    engine = Engine(model_of("v3"), block_size=8)
    for _ in engine.stream([4, 5, 6], Sampling(0.0, max_new_tokens=50)):
        break
    nothing_is_left(engine)
    outputs = engine.generate([[4, 5], [6, 7]], Sampling(0.0, max_new_tokens=9))
    next(outputs)
    outputs.close()
    nothing_is_left(engine)
    assert engine.counts.ended["abort"] >= 1


def test_biases_for_no_token_are_refused_before_they_hurt_others() -> None:
    engine = Engine(model_of("v3"))
    with pytest.raises(GenerationError, match="names token 101, outside the model's vocabulary"):
        engine.add([5], Sampling(logit_bias={101: 1.0}, max_new_tokens=5))
    for token in (-1, True):
        with pytest.raises(GenerationError, match="map token ids to numbers"):
            Sampling(logit_bias={token: 1.0})
    assert not engine.busy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_endless_bias_takes_its_token(temperature: float) -> None:
    engine = Engine(model_of("v3"))
    wish = Sampling(temperature, logit_bias={7: float("inf")}, max_new_tokens=3)
    assert next(engine.generate([[5]], wish)).token_ids == [7, 7, 7]


def test_one_block_is_enough_for_a_context_that_fits_it() -> None:
    engine = Engine(model_of("v3"), block_size=128, max_requests=1)
    output = next(engine.generate([[5, 6]], Sampling(0.0, max_new_tokens=126, ignore_eos=True)))
    assert len(output.token_ids) == 126


@torch.no_grad()
def test_after_a_change_of_weights_prefixes_can_be_forgotten() -> None:
    model, wish = model_of("v3"), Sampling(0.0, max_new_tokens=5, ignore_eos=True)
    engine, prompt = Engine(model, block_size=4), list(range(2, 40))
    next(engine.generate([prompt], wish))
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.2)
    engine.forget_prefixes()
    output = next(engine.generate([prompt], wish))
    assert output.usage.cached_tokens == 0
    assert output.token_ids == says(model, prompt, wish, set())[0]
