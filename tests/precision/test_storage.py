"""Weights in fewer bits: what they stand for, who reads them, and how far logits move."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.errors import ConfigError
from fathom.inference import Engine, Sampling
from fathom.inference.few import FewRows
from fathom.kernels.native import library
from fathom.precision import storage
from fathom.precision.storage import rounded, store_weights, widened
from tests.model.tiny import tiny_model

needs_compiler = pytest.mark.skipif(library() is None, reason="no C++ compiler")


@given(st.integers(1, 5), st.integers(1, 200), st.floats(1e-6, 1e6))
@settings(max_examples=100, deadline=None)
def test_rounding_is_by_less_than_half_a_step(outputs: int, inputs: int, size: float) -> None:
    weight = torch.randn(outputs, inputs) * size
    whole, scales = rounded(weight)
    assert whole.shape == weight.shape and whole.dtype == torch.int8
    wide = scales.repeat_interleave(64, dim=1)[:, :inputs]
    assert ((widened(whole, scales) - weight).abs() <= 0.5001 * wide).all()


def test_zeros_stay_zeros() -> None:
    assert (widened(*rounded(torch.zeros(3, 100))) == 0).all()


@needs_compiler
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_the_model_computes_with_what_is_stored(kind: str, rows: int) -> None:
    """Few rows, many rows: as a float32 model whose weights were rounded."""
    stored = store_weights(tiny_model(5, hidden_size=80).eval(), kind)
    wide = tiny_model(5, hidden_size=80).eval()
    with torch.no_grad():
        for (name, mine), (_, theirs) in zip(
            wide.named_parameters(), stored.named_parameters(), strict=True
        ):
            if theirs.dtype == torch.bfloat16:
                mine.copy_(theirs.float())
            elif theirs.dtype == torch.int8:
                mine.copy_(widened(*rounded(mine)))
            else:
                assert torch.equal(mine, theirs), name
        tokens = torch.randint(2, 101, (1, rows))
        expected, found = (m(tokens, mtp=False).logits for m in (wide, stored))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@needs_compiler
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_engine_and_step_speak_with_them(kind: str) -> None:
    wish = Sampling(0.0, max_new_tokens=20, ignore_eos=True)
    prompts = [[5, 6, 7], list(range(2, 40))]
    model = store_weights(tiny_model(2).eval(), kind)
    assert FewRows.suits(model)
    together = list(Engine(model, always_speculate=True).generate(prompts, wish))
    engine = Engine(model, speculate=0)
    for prompt, output in zip(prompts, together, strict=True):
        alone = next(engine.generate([prompt], wish))
        assert alone.token_ids == output.token_ids or output.usage.close_calls


@needs_compiler
def test_int8_stays_close() -> None:
    tokens = torch.randint(2, 101, (1, 60))
    with torch.no_grad():
        before = tiny_model(3).eval()(tokens, mtp=False).logits.log_softmax(-1)
        after = store_weights(tiny_model(3).eval(), "int8")(tokens, mtp=False).logits.log_softmax(
            -1
        )
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    assert 0 < divergence < 0.01


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="weights='int3' is not known"):
        store_weights(tiny_model(), "int3")
    with pytest.raises(ConfigError, match="is for float32 models on a CPU"):
        store_weights(tiny_model().bfloat16(), "int8")
    monkeypatch.setattr(storage, "library", lambda: None)
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        store_weights(tiny_model(), "int8")
