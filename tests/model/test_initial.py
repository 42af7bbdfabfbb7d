"""Runs of initial weights: the numbers that torch draws for whole tensors, and its generator where it would be."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fathom
from fathom.model import initial
from fathom.model.initial import Normals, Run, draw_runs, outline
from tests.model.tiny import random_fields, tiny_config

COUNTS = st.one_of(st.integers(1, 70), st.integers(1, 12).map(lambda blocks: 16 * blocks))


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[int, tuple[int, int] | None]]:
    """Numbers of some tensors, and which of them are wanted."""
    found: list[tuple[int, tuple[int, int] | None]] = []
    for count in draw(st.lists(COUNTS, min_size=1, max_size=8)):
        first = draw(st.integers(0, count - 1))
        wanted = (first, draw(st.integers(first + 1, count)))
        found.append((count, draw(st.sampled_from([None, wanted, (0, count)]))))
    return found


@settings(max_examples=150, deadline=None)
@given(tensors=runs(), piece=st.sampled_from([16, 48, 1 << 22]))
def test_a_run_is_drawn_as_the_whole_is(
    tensors: list[tuple[int, tuple[int, int] | None]], piece: int
) -> None:
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    normals = Normals(0.3, ours)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initial, "PIECE", piece)
        for count, wanted in tensors:
            whole = torch.empty(count).normal_(0.0, 0.3, generator=theirs)
            if wanted is None:
                normals.draw(count)
                continue
            run = Run(torch.full((wanted[1] - wanted[0],), torch.nan), wanted[0])
            normals.draw(count, run)
            assert torch.equal(run.tensor, whole[slice(*wanted)])
        normals.finish()
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("seed", range(6))
def test_runs_of_random_shapes_are_the_whole_model_s(seed: int) -> None:
    rng = random.Random(seed)
    fields = {**random_fields(rng), "num_nextn_predict_layers": rng.randrange(3)}
    config = tiny_config(
        **fields, hidden_size=rng.choice((28, 32)), vocab_size=rng.choice((97, 101))
    )
    torch.manual_seed(seed)
    whole = dict(fathom.Transformer(config).named_parameters())
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    drawn = {name: run_of(tensor, rng) for name, tensor in whole.items() if rng.random() < 0.7}
    draw_runs(config, drawn)
    assert torch.equal(torch.get_rng_state(), state)
    for name, run in drawn.items():
        expected = whole[name].detach().flatten()[run.offset : run.offset + run.tensor.numel()]
        assert torch.equal(run.tensor.flatten(), expected), name


def run_of(whole: Tensor, rng: random.Random) -> Run:
    """Some rows of it."""
    first = rng.randrange(len(whole))
    rows = rng.randint(1, len(whole) - first)
    empty = torch.full((rows, *whole.shape[1:]), torch.nan)
    return Run(empty, first * whole[0].numel())


def test_numbers_are_drawn_in_float32_whatever_they_are_kept_in() -> None:
    config = tiny_config()
    torch.manual_seed(2)
    whole = fathom.Transformer(config).to(torch.float64).lm_head.weight.detach()
    torch.manual_seed(2)
    run = Run(torch.empty_like(whole))
    draw_runs(config, {"lm_head.weight": run})
    assert torch.equal(run.tensor, whole)


def test_an_outline_has_no_memory_and_takes_no_numbers() -> None:
    state = torch.get_rng_state()
    model = outline(tiny_config())
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not model.rotary.theta.is_meta
    assert torch.equal(torch.get_rng_state(), state)
