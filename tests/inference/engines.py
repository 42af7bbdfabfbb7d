"""Small engines of every shape, random requests, and what each answer must be."""

from __future__ import annotations

import random
from typing import Any

import torch

import fathom
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
