"""The engine says what a model reading each whole text anew would say, whatever else goes on beside it."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import pytest
import torch

import fathom
from fathom.errors import GenerationError
from fathom.inference import Engine, Sampling
from fathom.inference.choice import CLOSE, Draw, scores
from tests.model.tiny import YARN, tiny_model

YARN_OF_TINY = {**YARN, "original_max_position_embeddings": 32, "factor": 4.0}
SHAPES: dict[str, dict[str, Any]] = {
    "v3": {"num_nextn_predict_layers": 2},
    "yarn": {"rope_scaling": YARN_OF_TINY},
    "no query latent": {"q_lora_rank": None, "num_nextn_predict_layers": 3},
    "wide values": {"v_head_dim": 20},
    "pre-norm": {"mtp_hidden": "pre_norm", "num_nextn_predict_layers": 2},
    "v2": {
        "model_type": "deepseek_v2",
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "num_nextn_predict_layers": 0,
    },
}


def model_of(shape: str, seed: int = 0) -> fathom.Transformer:
    return tiny_model(seed, **SHAPES[shape]).eval()


@torch.no_grad()
def says(
    model: fathom.Transformer, prompt: list[int], wish: Sampling, ends: set[int]
) -> tuple[list[int], float]:
    """The whole text through the whole model for each token; and the smallest gap there was."""
    ids, smallest = list(prompt), float("inf")
    for place in range(wish.max_new_tokens or 0):
        logits = model(torch.tensor([ids]), mtp=False).logits[0, -1:]
        draw = Draw(wish, wish.seed or 0, place, prompt, ids[len(prompt) :])
        best = scores(logits, [draw]).topk(2).values[0]
        smallest = min(smallest, float(best[0] - best[1]))
        ids.append(int(scores(logits, [draw]).argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :], smallest


def random_wish(rng: random.Random) -> Sampling:
    greedy = rng.random() < 0.5
    return Sampling(
        temperature=0.0 if greedy else rng.choice((0.3, 1.0, 1.7)),
        top_p=rng.choice((1.0, 0.8)),
        top_k=rng.choice((0, 5)),
        min_p=rng.choice((0.0, 0.05)),
        repetition_penalty=rng.choice((1.0, 1.3)),
        presence_penalty=rng.choice((0.0, 0.5)),
        frequency_penalty=rng.choice((0.0, 0.4)),
        seed=rng.randrange(1000),
        max_new_tokens=rng.randint(1, 24),
    )


def random_prompts(rng: random.Random, count: int) -> list[list[int]]:
    """Some begin alike."""
    shared = [rng.randrange(2, 101) for _ in range(40)]
    prompts = []
    for _ in range(count):
        begin = shared[: rng.choice((0, 0, 8, 17, 40))]
        prompts.append(begin + [rng.randrange(2, 101) for _ in range(rng.randint(1, 40))])
    return prompts


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


def small_engine(model: fathom.Transformer, tokens: int, **settings: Any) -> Engine:
    """An engine with a cache of about `tokens` tokens, so that requests push each other out."""
    engine = Engine(model, max_memory="1GiB", always_speculate=True, **settings)
    blocks = -(-tokens // engine.pool.size)
    return with_blocks(engine, blocks)


def with_blocks(engine: Engine, blocks: int) -> Engine:
    pool = type(engine.pool)(blocks, engine.pool.size)
    engine.pool = engine.scheduler.pool = pool
    engine.maker.room = blocks * pool.size
    return engine


def check(
    model: fathom.Transformer, engine: Engine, prompts: list[list[int]], wishes: list[Sampling]
) -> None:
    outputs = list(engine.generate(prompts, wishes))
    assert [output.prompt_index for output in outputs] == list(range(len(prompts)))
    for prompt, wish, output in zip(prompts, wishes, outputs, strict=True):
        expected, gap = says(model, prompt, wish, {model.config.eos_token_id})
        if output.token_ids != expected:
            assert gap < CLOSE, (output.token_ids, expected, gap)
        assert output.usage.completion_tokens == len(output.token_ids)
        assert output.finish_reason == ("stop" if output.token_ids[-1] == 1 else "length")
    nothing_is_left(engine)


def nothing_is_left(engine: Engine) -> None:
    assert engine.pool.free == engine.pool.count
    assert not engine.busy and (engine.drafter is None or not engine.drafter.trails)
    assert (engine.pool._holders == 0).all() and (engine.pool._place_of == -1).all()


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
