"""Whole blocks in one call say what the model's own modules say, on pages and for any texts' rows."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fathom
from fathom.inference import Engine, Sampling, generate
from fathom.inference.few import FewRows
from fathom.inference.layout import Span, lay_out
from fathom.kernels.native import library
from fathom.model.layers import RMSNorm
from fathom.precision.storage import store_weights
from tests.model.tiny import random_fields, tiny_model

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")

V2 = {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False}
SHAPES: list[dict[str, Any]] = [
    *(random_fields(random.Random(seed)) for seed in range(12)),
    V2,
    {"topk_method": "greedy", "scoring_func": "softmax"},
    {"rope_interleave": False},
    {"n_shared_experts": 0},
    {"n_shared_experts": 2},
    {"first_k_dense_replace": 3},
    {"first_k_dense_replace": 0, "vocab_size": 1500},
]
BLOCK = 4


def scattered(rng: random.Random, texts: int) -> tuple[list[Span], list[int]]:
    """Some last tokens of some texts, whose blocks lie anywhere in the cache."""
    free, spans = list(range(100)), []
    rng.shuffle(free)
    for _ in range(texts):
        blocks = [free.pop() for _ in range(8)]
        spans.append(Span(blocks, rng.choice([0, 3]), rng.randint(3, 20), rng.randint(1, 4)))
    return spans, [rng.randrange(50) for span in spans for _ in range(span.count)]


def both(model: fathom.Transformer, seed: int, texts: int) -> list[tuple[Tensor, Tensor]]:
    """Hidden states, MTP states and the cache by C++ and by the model, on the same rows."""
    rng = random.Random(seed)
    engine = Engine(model, max_memory="64MiB", block_size=BLOCK)
    assert engine.few is not None
    spans, tokens = scattered(rng, texts)
    pages, modules = engine.pages, model.model.mtp
    with torch.inference_mode():
        for entries in pages.layers:
            entries.normal_(generator=torch.Generator().manual_seed(seed))
        states = torch.randn(len(tokens), model.config.hidden_size)
        few = [engine.few.read(tokens, spans)[0]]
        few += [engine.few.predict(module, states, tokens, spans) for module in modules]
        few += [entries.clone() for entries in pages.layers]
        embedded = model.embed(torch.tensor([tokens]))
        whole = [model.read(torch.tensor([tokens]), lay_out(model, pages, BLOCK, spans)).hidden[0]]
        for module in modules:
            context = lay_out(model, pages, BLOCK, spans)
            whole.append(module.predict(states[None], embedded, context)[0])
    return list(zip(few, [*whole, *pages.layers], strict=True))


@pytest.mark.parametrize("fields", SHAPES)
@pytest.mark.parametrize("texts", [1, 3, 9])
def test_it_equals_the_model(fields: dict[str, Any], texts: int) -> None:
    model = tiny_model(**{"num_nextn_predict_layers": 1} | fields).eval()
    for found, expected in both(model, texts, texts):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("threads", [2, 3])
def test_on_several_threads(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for found, expected in both(tiny_model(num_nextn_predict_layers=2).eval(), 5, 4):
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_weights_in_fewer_bits(storage: str) -> None:
    model = store_weights(tiny_model(num_nextn_predict_layers=1).eval(), storage)
    for found, expected in both(model, 7, 3):
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("block_size", [4, 64])
def test_an_engine_says_the_same_with_it(block_size: int) -> None:
    model = tiny_model(num_nextn_predict_layers=0).eval()
    expected = generate(model, [1, 2, 3], 40)
    engine = Engine(model, block_size=block_size)
    wish = Sampling(temperature=0.0, max_new_tokens=40, ignore_eos=True)
    assert next(engine.generate([[1, 2, 3]], wish)).token_ids == expected


def moved(model: fathom.Transformer, other: fathom.Transformer, way: str) -> None:
    """The weights of `other` come into `model`."""
    if way == "assigned":
        model.load_state_dict(other.state_dict(), assign=True)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        if way == "replaced":
            mine.data = theirs.data.clone()
        elif way == "copied":
            mine.data.copy_(theirs.data)


@pytest.mark.parametrize("way", ["assigned", "replaced", "copied"])
def test_weights_that_moved_are_found_again(way: str) -> None:
    model, other = (tiny_model(num_nextn_predict_layers=1).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    engine, wish = Engine(model), Sampling(0.0, max_new_tokens=12, ignore_eos=True)
    first = next(engine.generate([[1, 2, 3]], wish)).token_ids
    moved(model, other, way)
    engine.forget_prefixes()
    second = next(engine.generate([[1, 2, 3]], wish)).token_ids
    assert second == generate(other, [1, 2, 3], 12) and second != first
    assert engine.few is not None


def test_a_model_that_no_longer_suits_is_read_by_itself() -> None:
    model = tiny_model(num_nextn_predict_layers=1).eval()
    engine, wish = Engine(model), Sampling(0.0, max_new_tokens=12, ignore_eos=True)
    assert len(next(engine.generate([[1, 2, 3]], wish)).token_ids) == 12
    model.set_compute_dtype(torch.bfloat16)
    assert len(next(engine.generate([[1, 2, 3]], wish)).token_ids) == 12
    assert engine.few is None


def replace_product(model: fathom.Transformer) -> None:
    model.lm_head.matmul = lambda x, weight, dtype: x @ weight.T


def derive(model: fathom.Transformer) -> None:
    class Doubled(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.model.layers[0].input_layernorm.__class__ = Doubled


def hook(model: fathom.Transformer) -> None:
    model.model.layers[0].register_forward_hook(lambda module, given, made: made)


def narrow_norms(model: fathom.Transformer) -> None:
    model.model.layers[0].input_layernorm.bfloat16()


def expand_norm(model: fathom.Transformer) -> None:
    norm = model.model.layers[0].input_layernorm
    norm.weight.data = torch.ones(1).expand(len(norm.weight))


CHANGES = [replace_product, derive, hook, narrow_norms, expand_norm, fathom.Transformer.bfloat16]


@pytest.mark.parametrize("change", CHANGES)
def test_what_it_suits(change: Callable[[fathom.Transformer], Any]) -> None:
    model = tiny_model().eval()
    assert FewRows.suits(model)
    change(model)
    assert not FewRows.suits(model)


def test_an_expert_that_is_no_number_shows() -> None:
    """A router row of NaN: torch's `topk` takes it before all others, and so does C++."""
    model = tiny_model(num_nextn_predict_layers=0).eval()
    with torch.no_grad():
        model.model.layers[-1].mlp.gate.weight[3] = float("nan")
    engine = Engine(model)
    output = next(engine.generate([[1, 2, 3]], Sampling(0.0, max_new_tokens=4)))
    assert output.finish_reason == "error"


def test_other_defaults_of_torch_change_nothing() -> None:
    model = tiny_model(num_nextn_predict_layers=1).eval()
    wish = Sampling(0.0, max_new_tokens=8, ignore_eos=True)
    expected = next(Engine(model).generate([[1, 2, 3]], wish)).token_ids
    torch.set_default_dtype(torch.float64)
    try:
        assert next(Engine(model).generate([[1, 2, 3]], wish)).token_ids == expected
    finally:
        torch.set_default_dtype(torch.float32)
