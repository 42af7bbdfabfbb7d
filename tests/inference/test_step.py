"""The fast step for single tokens says what the model says, in both its forms."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import fathom
from fathom.inference import Engine, Sampling, Step, generate
from fathom.inference.step import attend
from fathom.kernels.paged_attention import LONG
from tests.model.tiny import random_fields, tiny_model

LENGTH = 20
V2 = {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False}
SHAPES: list[dict[str, Any]] = [
    *(random_fields(random.Random(seed)) for seed in range(8)),
    V2,
    {"rope_interleave": False},
    {"n_shared_experts": 0},
    {"first_k_dense_replace": 3},
    {"first_k_dense_replace": 0, "vocab_size": 1500},
]


def make_model(**fields: Any) -> fathom.Transformer:
    return tiny_model(**{"num_nextn_predict_layers": 0} | fields).eval()


def texts() -> Tensor:
    return torch.randint(0, 101, (1, LENGTH), generator=torch.Generator().manual_seed(3))


def whole_and_stepwise(model: fathom.Transformer, compiled: bool) -> tuple[Tensor, Tensor]:
    """Logits of a text by the model at once, and by single steps behind a short prefill."""
    tokens, cache = texts(), fathom.LatentCache(model.config, 1, LENGTH)
    with torch.inference_mode():
        expected = model(tokens).logits[0]
        step = Step(model, compiled)
        first = model(tokens[:, :5], cache=cache).logits[0]
        rest = [step(token, cache) for token in tokens[0, 5:].tolist()]
        assert cache.length == LENGTH
    return expected, torch.cat([first, *rest])


@pytest.mark.parametrize("fields", SHAPES)
def test_steps_equal_the_whole(fields: dict[str, Any]) -> None:
    expected, found = whole_and_stepwise(make_model(**fields), compiled=False)
    assert (found - expected).abs().max() <= 1e-5


def test_compiled_steps_equal_the_whole(recwarn: pytest.WarningsRecorder) -> None:
    model = make_model()
    expected, found = whole_and_stepwise(model, compiled=True)
    assert (found - expected).abs().max() <= 1e-5
    assert not [w for w in recwarn if "torch.compile failed" in str(w.message)]
    step, cache = Step(model, compiled=True), fathom.LatentCache(model.config, 1, 100)
    with torch._dynamo.config.patch(error_on_recompile=True):  # once for any length of text
        for token in range(100):
            step(token, cache)


def test_without_a_compiler_the_plain_form_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: Any, **__: Any) -> Any:
        return _fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.warns(UserWarning, match="torch.compile failed, going on without it: no g"):
        expected, found = whole_and_stepwise(make_model(), compiled=True)
    assert (found - expected).abs().max() <= 1e-5


def _fail(*_: Any) -> Any:
    raise RuntimeError("no g++ here")


@pytest.mark.parametrize("length", [7, LONG + 3])
def test_attention_over_the_cache(length: int) -> None:
    query, cache = torch.randn(3, 12), torch.randn(length, 12)
    expected = torch.einsum("hs,sx->hx", torch.einsum("hx,sx->hs", query, cache).softmax(-1), cache)
    torch.testing.assert_close(attend(query, cache), expected, atol=1e-5, rtol=1e-5)


def test_the_model_itself_still_says_the_same() -> None:
    model = make_model(n_shared_experts=2)
    with torch.inference_mode():
        expected = model(texts()).logits
        Step(model)
        assert (model(texts()).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("block_size", [4, 64])
def test_an_engine_says_the_same_with_it(block_size: int) -> None:
    model = make_model()
    expected = generate(model, [1, 2, 3], 40)
    engine = Engine(model, single=Step(model), block_size=block_size)
    wish = Sampling(temperature=0.0, max_new_tokens=40, ignore_eos=True)
    assert next(engine.generate([[1, 2, 3]], wish)).token_ids == expected


def test_what_it_suits() -> None:
    model = make_model()
    assert Step.suits(model)
    assert not Step.suits(make_model().bfloat16())
    model.set_compute_dtype(torch.bfloat16)
    assert not Step.suits(model)
    replaced = make_model()
    replaced.lm_head.matmul = lambda x, weight, dtype: x @ weight.T
    assert not Step.suits(replaced)
