"""ZeRO-1's update bit for bit, its state by names that every layout understands, and decisions made by all alike."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fathom
from fathom.errors import CheckpointError
from fathom.model import Losses
from fathom.parallel import Layout, Mesh, Parallel
from fathom.parallel.pieces import fill
from fathom.parallel.zero import ALIGN
from fathom.train import loop
from fathom.train.ema import Ema, EmaConfig
from fathom.train.guard import GuardConfig
from fathom.train.loop import StepRecord, Trainer, train_stage
from fathom.train.optimizer import (
    OptimConfig,
    build_adamw,
    clip,
    set_learning_rate,
)
from tests.model.tiny import tiny_config
from tests.parallel.processes import run
from tests.parallel.test_layouts import Case, plan

SMALL = 1 << 13
"""Bytes of a bucket, so that there are many."""


def model() -> fathom.Transformer:
    torch.manual_seed(5)
    return fathom.Transformer(tiny_config(initializer_range=0.05))


def gradients(step: int, like: fathom.Transformer) -> dict[str, Tensor]:
    """Random gradients of one process; MTP has none in step 2."""
    random = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(parameter.shape, generator=random) * 10 ** (-step)
        for name, parameter in like.named_parameters()
        if step != 2 or "mtp" not in name
    }


def update(
    trained: fathom.Transformer, optimizer: torch.optim.AdamW, parallel: Parallel, steps: range
) -> list[float]:
    """Steps with given gradients, all of them on the first rank that holds the parameter; the norms."""
    norms = []
    for step in steps:
        whole = gradients(step, model())
        for one in parallel.named:
            if one.name in whole:
                run = whole[one.name].flatten()[one.offset : one.offset + one.parameter.numel()]
                mine = run if one.copies.place == 0 else torch.zeros_like(run)
                one.parameter.grad = mine.view_as(one.parameter).clone()
        zero = torch.zeros(())
        loads = torch.zeros(3, 8, dtype=torch.int64)
        parallel.reduce(Losses(zero, zero, zero, zero, (zero,), loads))
        norms.append(clip(trained, 1.0, parallel).item())
        set_learning_rate(optimizer, 1e-2)
        optimizer.step()
        parallel.share()
        optimizer.zero_grad()
    return norms


def one_process(steps: int = 4) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Weights and AdamW's state after some steps, and the norms."""
    trained = model()
    parallel = Parallel(trained)
    optimizer = build_adamw(trained, OptimConfig(), parallel)
    norms = update(trained, optimizer, parallel, range(1, steps + 1))
    state = {s.name: s.tensor.view(s.shape) for s in parallel.optimizer_shards(optimizer)}
    return {n: p.detach() for n, p in trained.named_parameters()}, state, norms


def on_a_rank(layout: Layout, zero1: bool) -> dict[str, Any]:
    trained = model()
    parallel = Parallel(trained, Mesh(layout), zero1, SMALL)
    optimizer = build_adamw(trained, OptimConfig(), parallel)
    norms = update(trained, optimizer, parallel, range(1, 5))
    shards = [*parallel.weight_shards(), *parallel.optimizer_shards(optimizer)]
    return {
        "weights": {name: w.clone() for name, w in parallel.whole_weights()},
        "shards": [(s.name, s.tensor.clone(), s.shape, s.offset, s.first) for s in shards],
        "norms": norms,
        "moments": sum(state["exp_avg"].numel() for state in optimizer.state.values()),
    }


LAYOUTS = [
    (Layout(dp=2), True),
    (Layout(dp=4, ep=2), True),
    (Layout(dp=4, ep=2), False),
    (Layout(dp=3), True),
]


@pytest.mark.parametrize(("layout", "zero1"), LAYOUTS, ids=str)
def test_the_update_is_adamws(layout: Layout, zero1: bool) -> None:
    """Up to the last bits of the norm that the gradient is clipped to, which is summed in another order."""
    weights, state, norms = one_process()
    ranks = run(on_a_rank, layout.world, layout, zero1)
    for rank in ranks:
        assert rank["norms"] == pytest.approx(norms, rel=1e-6)
        for name, weight in weights.items():
            close(rank["weights"][name], weight, name)
    put_together = assemble(ranks)
    assert put_together.keys() == weights.keys() | state.keys()
    for name, one in {**weights, **state}.items():
        close(put_together[name], one, name)
    numbers = sum(weight.numel() for weight in weights.values())
    if zero1:
        assert sum(rank["moments"] for rank in ranks) == numbers
        assert max(rank["moments"] for rank in ranks) < 1.3 * numbers / layout.world


def close(a: Tensor, b: Tensor, name: str) -> None:
    assert a.shape == b.shape and (a - b).norm() <= 1e-6 * b.norm(), name


def assemble(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """All shards that are to be written, laid where they say; each number must come exactly once."""
    found: dict[str, Tensor] = {}
    for rank in ranks:
        for name, tensor, shape, offset, first in rank["shards"]:
            if first:
                whole = found.setdefault(name, torch.full((shape.numel(),), math.nan))
                assert whole[offset : offset + tensor.numel()].isnan().all(), name
                whole[offset : offset + tensor.numel()] = tensor
    shapes = {name: shape for name, _, shape, _, _ in ranks[0]["shards"]}
    for rank in ranks:
        shapes |= {name: shape for name, _, shape, _, _ in rank["shards"]}
    assert not any(whole.isnan().any() for whole in found.values())
    return {name: whole.view(shapes[name]) for name, whole in found.items()}


def unclipped(layout: Layout) -> dict[str, Tensor]:
    """One step whose gradient is too small to be clipped."""
    trained = model()
    parallel = Parallel(trained, Mesh(layout) if layout.world > 1 else None, True, SMALL)
    optimizer = build_adamw(trained, OptimConfig(), parallel)
    assert update(trained, optimizer, parallel, range(4, 7))[0] < 1
    return {name: w.clone() for name, w in parallel.whole_weights()}


@pytest.mark.parametrize("layout", [Layout(dp=3), Layout(dp=4, ep=2)], ids=str)
def test_without_clipping_it_is_equal_bit_for_bit(layout: Layout) -> None:
    expected = unclipped(Layout())
    for rank in run(unclipped, layout.world, layout):
        for name, weight in expected.items():
            assert torch.equal(rank[name], weight), name


def test_runs_begin_at_whole_registers() -> None:
    """So a vectorised update treats a number alike wherever a parameter was cut."""
    assert ALIGN % 64 == 0
    for starts in run(starts_of_pieces, 3):
        assert starts and all(start % ALIGN == 0 for start in starts)


def starts_of_pieces() -> list[int]:
    parallel = Parallel(model(), Mesh(Layout(dp=3)), True, SMALL)
    return [piece.start for piece in parallel.pieces]


# --- another layout goes on ----------------------------------------------------------------------


def goes_on(layout: Layout, zero1: bool, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """A fresh rank takes over what another layout has written, and does two more steps."""
    trained = model()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.zero_()
    parallel = Parallel(trained, Mesh(layout) if layout.world > 1 else None, zero1, SMALL)
    optimizer = build_adamw(trained, OptimConfig(), parallel)
    fill([*parallel.weight_shards(), *parallel.optimizer_shards(optimizer)], saved)
    parallel.share()
    update(trained, optimizer, parallel, range(5, 7))
    return {name: w.clone() for name, w in parallel.whole_weights()}


def test_another_layout_goes_on_from_the_shards() -> None:
    saved = assemble(run(on_a_rank, 4, Layout(dp=4, ep=2), True))
    expected = goes_on(Layout(), False, saved)
    for layout, zero1 in ((Layout(dp=2, ep=2), True), (Layout(dp=3), True), (Layout(dp=2), False)):
        for rank in run(goes_on, layout.world, layout, zero1, saved):
            for name, weight in expected.items():
                assert torch.equal(rank[name], weight), (layout, name)


def test_shards_of_another_model_are_refused() -> None:
    trained = model()
    parallel = Parallel(trained)
    whole = {name: p.detach().clone() for name, p in trained.named_parameters()}
    whole["lm_head.weight"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is of shape \(2, 2\)"):
        fill(parallel.weight_shards(), whole)
    del whole["lm_head.weight"]
    with pytest.raises(CheckpointError, match="missing"):
        fill(parallel.weight_shards(), whole)


def what_a_rank_averages(layout: Layout) -> dict[str, Any]:
    trained = model()
    parallel = Parallel(trained, Mesh(layout), True, SMALL)
    ema = Ema(trained, EmaConfig(0.5))
    for router in trained.routers():
        assert router.e_score_correction_bias is not None
        router.e_score_correction_bias += 1
    ema.update(1)
    shards = parallel.model_shards(ema.tensors())
    return {"shards": [(s.name, s.tensor.clone(), s.shape, s.offset, s.first) for s in shards]}


def test_the_average_has_names_and_places_too() -> None:
    found = assemble(run(what_a_rank_averages, 4, Layout(dp=4, ep=2)))
    expected = model()
    assert found.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        if "correction_bias" in name:
            assert torch.equal(found[name], torch.full((8,), 0.9))  # the first update keeps 1/10
        else:
            torch.testing.assert_close(found[name], tensor)


# --- all decide alike ----------------------------------------------------------------------------


def not_a_number(where: str) -> tuple[float, float]:
    """Loss and norm that a rank sees when the second rank has met a NaN."""
    trained = model()
    parallel = Parallel(trained, Mesh(Layout(dp=2, ep=2)), True, SMALL)
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    loss = torch.tensor(1.0)
    if dist.get_rank() == 1:
        loss = torch.tensor(math.nan) if where == "loss" else loss
        if where in ("expert", "norm"):
            name = "down_proj" if where == "expert" else "norm.weight"
            found = [p for n, p in trained.named_parameters() if n.endswith(name)]
            assert found[0].grad is not None
            found[0].grad.view(-1)[0] = math.nan
    zero = torch.zeros(())
    loads = torch.zeros(3, 8, dtype=torch.int64)
    total = parallel.reduce(Losses(loss, zero, zero, loss, (), loads)).total.item()
    return total, clip(trained, 1.0, parallel).item()


@pytest.mark.parametrize("where", ["loss", "expert", "norm", "nowhere"])
def test_nan_on_one_rank_is_seen_by_all(where: str) -> None:
    for total, norm in run(not_a_number, 2, where):
        assert math.isnan(total) == (where == "loss")
        assert math.isnan(norm) == (where in ("expert", "norm"))


def steps_with_a_nan() -> list[tuple[str | None, float]]:
    """What became of each step on a rank, and of a weight, when the second rank's gradient is spoilt in step 3."""
    real = loop.accumulate_gradients

    def spoilt(trained: fathom.Transformer, batch: Any, micro: int, at: Any, *more: Any) -> Losses:
        found = real(trained, batch, micro, at, *more)
        if dist.get_rank() == 1 and at.step == 3:
            gradient = trained.lm_head.weight.grad
            assert gradient is not None
            gradient[0, 0] = math.nan
        return found

    loop.accumulate_gradients = spoilt  # type: ignore[assignment]
    trained = model()
    parallel = Parallel(trained, Mesh(Layout(dp=2, ep=2)), True, SMALL)
    trainer = Trainer.start(trained, OptimConfig(), GuardConfig("skip"), None, parallel)
    seen: list[tuple[str | None, float]] = []

    def note(trainer: Trainer, record: StepRecord) -> None:
        seen.append((record.skipped, trained.lm_head.weight[0, 0].item()))

    stage = plan(Case())
    stage.last_step = 4
    train_stage(trainer, stage, [note])
    return seen


def test_all_skip_a_step_that_is_not_finite_on_one_rank() -> None:
    first, second = run(steps_with_a_nan, 2)
    assert first == second
    skipped, weights = zip(*first, strict=True)
    assert [reason is not None for reason in skipped] == [False, False, True, False]
    assert "not finite" in skipped[2]
    assert weights[2] == weights[1] and math.isfinite(weights[3]) and weights[3] != weights[2]
