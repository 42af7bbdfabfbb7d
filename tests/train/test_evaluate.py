"""Held-out loss: every token counted once, whatever the cut, and nothing of training touched."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fathom
from fathom.data import TokenData, Tokens
from fathom.train.evaluate import bits_per_byte, evaluate
from tests.model.tiny import TINY, tiny_model


def data(count: int) -> TokenData:
    """Held-out tokens only; each stands for three bytes."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, TINY["vocab_size"], count).astype(np.uint16)
    manifest = {"bytes": {"held_out": 3 * count}, "tokens": {"held_out": count}}
    parts = {("held_out", "text"): Tokens.of(tokens)}
    return TokenData(parts, None, manifest)  # type: ignore[arg-type]


def by_hand(model: fathom.Transformer, tokens: np.ndarray, seq_len: int) -> float:
    """Mean cross-entropy, window by window, from whole logits."""
    total = 0.0
    for start in range(0, len(tokens) - 1, seq_len):
        window = torch.from_numpy(tokens[None, start : start + seq_len + 1].astype(np.int64))
        with torch.no_grad():
            logits = model(window[:, :-1], mtp=False).logits[0]
        total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    return total / (len(tokens) - 1)


@pytest.mark.parametrize("count", [2, 3, 16, 17, 18, 100])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_is_the_mean_over_every_token(count: int, batch: int) -> None:
    model, held_out = tiny_model(), data(count)
    found = evaluate(model, held_out, 16, batch)
    assert found.tokens == count - 1
    assert found.loss == pytest.approx(by_hand(model, np.asarray(held_out.held_out), 16), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) / 3)


def test_a_limit_takes_the_first_tokens() -> None:
    model, held_out = tiny_model(), data(100)
    found = evaluate(model, held_out, 16, 2, limit_tokens=40)
    assert found.tokens == 39
    assert found.loss == pytest.approx(by_hand(model, held_out.held_out[:40], 16), rel=1e-5)


def test_mtp_is_looked_at_where_it_is_trained() -> None:
    model = tiny_model()
    assert evaluate(model, data(50), 16, 2).mtp_loss > 1.0
    assert evaluate(model, data(50), 16, 2, mtp=False).mtp_loss == 0.0


def test_training_state_is_left_as_it_was() -> None:
    model = tiny_model()
    for training in (True, False):
        model.train(training)
        evaluate(model, data(50), 16, 2)
        assert model.training is training
    assert all(int(router.expert_load.sum()) == 0 for router in model.routers())
    assert all(p.grad is None for p in model.parameters())


def test_a_coin_for_each_bit_costs_one_bit() -> None:
    assert bits_per_byte(8 * math.log(2), 1.0) == pytest.approx(8.0)
