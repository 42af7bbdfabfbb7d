"""Loss by position against whole logits, bucket by bucket."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fathom
from fathom.train.evaluate import evaluate
from fathom.train.positions import doubling_edges, loss_by_position
from tests.model.tiny import YARN, tiny_model
from tests.train.test_evaluate import data


def by_hand(model: fathom.Transformer, tokens: np.ndarray, seq_len: int, windows: int) -> list:
    """Mean loss at every single position over the first windows, from whole logits."""
    rows = [tokens[i * seq_len : (i + 1) * seq_len + 1] for i in range(windows)]
    text = torch.from_numpy(np.stack(rows).astype(np.int64))
    with torch.no_grad():
        logits = model(text[:, :-1], mtp=False).logits
    losses = torch.nn.functional.cross_entropy(logits.mT, text[:, 1:], reduction="none")
    return losses.double().mean(0).tolist()


@pytest.mark.parametrize(
    ("length", "edges"),
    [
        (1, (0, 1)),
        (2, (0, 1, 2)),
        (16, (0, 1, 2, 4, 8, 16)),
        (17, (0, 1, 2, 4, 8, 16, 17)),
        (100, (0, 1, 2, 4, 8, 16, 32, 64, 100)),
    ],
)
def test_edges(length: int, edges: tuple[int, ...]) -> None:
    assert doubling_edges(length) == edges


@pytest.mark.parametrize("seq_len", [7, 16, 33])
@pytest.mark.parametrize("scaling", [None, YARN])
def test_buckets_are_means_over_their_positions(seq_len: int, scaling: dict | None) -> None:
    model, text = tiny_model(), data(100)
    model.set_rope_scaling(scaling)
    found = loss_by_position(model, text, seq_len, 3 * seq_len)
    assert found.edges == doubling_edges(seq_len) and found.tokens == 3 * seq_len
    single = by_hand(model.eval(), text.held_out, seq_len, 3)
    for lo, hi, loss in zip(found.edges, found.edges[1:], found.loss, strict=False):
        assert loss == pytest.approx(sum(single[lo:hi]) / (hi - lo), rel=1e-5)


def test_weighted_by_positions_it_is_the_held_out_loss() -> None:
    model, text = tiny_model(), data(97)
    found = loss_by_position(model, text, 16, 10**9)
    widths = np.diff(found.edges)
    assert (widths * found.loss).sum() / 16 == pytest.approx(
        evaluate(model, text, 16, 2).loss, rel=1e-5
    )


def test_one_window_at_least_and_no_part_of_one() -> None:
    model, text = tiny_model(), data(100)
    assert loss_by_position(model, text, 32, 1).tokens == 32
    assert loss_by_position(model, text, 32, 95).tokens == 64
    assert loss_by_position(model, text, 32, 10**9).tokens == 96  # 3 left of 99 targets


def test_text_shorter_than_a_window_ends_the_buckets() -> None:
    model, text = tiny_model(), data(20)
    found = loss_by_position(model, text, 64, 10**9)
    assert found.edges == (0, 1, 2, 4, 8, 16, 19) and found.tokens == 19
    single = by_hand(model.eval(), text.held_out, 19, 1)
    assert found.loss[-1] == pytest.approx(sum(single[16:]) / 3, rel=1e-5)


def test_training_state_is_left_as_it_was() -> None:
    model = tiny_model().train()
    loss_by_position(model, data(50), 16, 32)
    assert model.training
    assert all(int(router.expert_load.sum()) == 0 for router in model.routers())
