"""A rank's part made without the whole: the weights and buffers of one process, and no more memory than they take."""

from __future__ import annotations

import random
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fathom
from fathom.model import initial, mersenne
from fathom.model.initial import outline
from fathom.parallel import Layout, Mesh, Parallel
from fathom.parallel.building import holdings
from fathom.parallel.pipeline import Plan
from fathom.parallel.zero import ALIGN
from tests.model.tiny import YARN, random_fields, tiny_config
from tests.parallel import test_layouts as layouts
from tests.parallel.paper import on_paper
from tests.parallel.processes import run

CPU = torch.device("cpu")
TIED, TWO_DEPTHS = {"tie_word_embeddings": True}, {"num_nextn_predict_layers": 2}
PIPE, DUAL = {"schedule": "1F1B"}, {"schedule": "DualPipe"}
ZBV = {"schedule": "ZBV", "num_nextn_predict_layers": 0}
DENSE = {"schedule": "DualPipeV", "first_k_dense_replace": 3}
CASES = [
    pytest.param(Layout(dp=3), {}, (), True, id="dp3 zero1"),
    pytest.param(Layout(dp=4, ep=2), {}, (), False, id="dp4 ep2"),
    pytest.param(Layout(dp=4, ep=4), TWO_DEPTHS, (), True, id="dp4 ep4 zero1, two depths"),
    pytest.param(Layout(dp=2), TIED, (), False, id="dp2 tied"),
    pytest.param(Layout(pp=3), PIPE, (1, 3, 1), True, id="pp3 uneven zero1"),
    pytest.param(Layout(pp=2, dp=2), {**PIPE, **TIED}, (4, 1), True, id="pp2 dp2 tied zero1"),
    pytest.param(Layout(pp=2), ZBV, (1, 1, 2, 1), False, id="ZBV without MTP"),
    pytest.param(
        Layout(pp=2, dp=2, ep=2), {**DUAL, **TWO_DEPTHS}, (2, 3), True, id="DualPipe zero1, two depths"
    ),
    pytest.param(Layout(pp=4, dp=2, ep=2), {**DUAL, **TIED}, (1, 2, 1, 1), False, id="DualPipe tied"),
    pytest.param(Layout(pp=2), DENSE, (2, 1, 1, 1), True, id="DualPipeV, dense layers, zero1"),
    pytest.param(Layout(dp=2), {"q_lora_rank": 1}, (), False, id="dp2, a norm of one number"),
    pytest.param(Layout(dp=2), {"q_lora_rank": 1}, (), True, id="dp2 zero1, a norm of one number"),
]  # fmt: skip


def build(
    layout: Layout, rank: int, config: fathom.ModelConfig, plan: Plan | None, zero1: bool
) -> Parallel:
    """A rank's part, as a run makes it."""
    torch.manual_seed(7)
    mesh = on_paper(layout, rank)
    return Parallel(outline(config), mesh, zero1, 1 << 14, plan, outline_on=CPU)


def whole_of(config: fathom.ModelConfig) -> fathom.Transformer:
    torch.manual_seed(7)
    return fathom.Transformer(config)


def laid_out(
    layout: Layout, fields: dict[str, Any], counts: tuple[int, ...]
) -> tuple[fathom.ModelConfig, Plan | None]:
    fields = {"num_hidden_layers": 5, "initializer_range": 0.05, **fields}
    schedule = fields.pop("schedule", None)
    config = tiny_config(**fields)
    return config, Plan(config, layout.pp, schedule, counts) if schedule else None


def same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def check_part(parallel: Parallel, whole: fathom.Transformer) -> None:
    """Parameters, buffers and what is shared are the whole model's."""
    expected = dict(whole.named_parameters())
    for one in parallel.named:
        flat = expected[one.name].detach().flatten()
        run = flat[one.offset : one.offset + one.parameter.numel()]
        assert torch.equal(one.parameter.detach().flatten(), run), one.name
        assert one.parameter.stride() == torch.empty(one.parameter.shape).stride(), one.name
        assert one.parameter.requires_grad, one.name
    buffers = dict(whole.named_buffers())
    for name, buffer in parallel.model.named_buffers():
        assert torch.equal(buffer, buffers[name]) and buffer.dtype == buffers[name].dtype, name
    persistent = set(whole.state_dict())
    assert set(parallel.model.state_dict()) <= persistent
    for piece in parallel.pieces:
        run = expected[piece.of.name].detach().flatten()[piece.place]
        assert torch.equal(piece.part.detach().flatten(), run), piece.of.name
        assert same_memory(piece.part, piece.of.parameter), piece.of.name
    model = parallel.model
    if whole.config.tie_word_embeddings and hasattr(model.lm_head, "weight"):
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.rotary.theta, whole.rotary.theta)


@pytest.mark.parametrize(("layout", "fields", "counts", "zero1"), CASES)
def test_weights_and_buffers_are_those_of_one_process(
    layout: Layout, fields: dict[str, Any], counts: tuple[int, ...], zero1: bool
) -> None:
    """And as many on each rank as is said beforehand."""
    config, plan = laid_out(layout, fields, counts)
    whole, state = whole_of(config), torch.get_rng_state()
    said, updated = holdings(config, layout, plan, zero1), [0] * layout.pp
    names = set()
    for rank in range(layout.world):
        parallel = build(layout, rank, config, plan, zero1)
        check_part(parallel, whole)
        assert torch.equal(torch.get_rng_state(), state)
        names |= {one.name for one in parallel.named}
        place = parallel.mesh.pp.place
        assert sum(one.parameter.numel() for one in parallel.named) == said[place].weights
        updated[place] += sum(piece.part.numel() for piece in parallel.pieces)
    assert names == {name for name, _ in whole.named_parameters()}
    if zero1:  # runs of buckets are equal, but for their ends
        expected, slack = sum(one.updated for one in said), ALIGN * len(names)
        assert abs(sum(updated) / layout.dp - expected) <= slack
    else:
        assert updated == [layout.dp * one.updated for one in said]


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes_too(seed: int) -> None:
    rng = random.Random(seed)
    fields = {**random_fields(rng), "num_hidden_layers": rng.choice((4, 5))}
    config = tiny_config(
        **fields, hidden_size=rng.choice((20, 28)), moe_intermediate_size=rng.choice((3, 5))
    )
    layout = Layout(pp=rng.choice((1, 2)), dp=4, ep=rng.choice((1, 2, 4)))
    plan = Plan(config, 2, rng.choice(("GPipe", "DualPipe"))) if layout.pp > 1 else None
    whole = whole_of(config)
    for rank in range(0, layout.world, 3):
        check_part(build(layout, rank, config, plan, rng.random() < 0.5), whole)


class Peak(TorchDispatchMode):
    """The most bytes of tensors that are there at a time, of those made within; the `meta` device has none."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        wraps = hasattr(found, "to_local")  # FSDP's tensors have their memory in another one
        if isinstance(found, Tensor) and not found.is_meta and not wraps:
            storage = found.untyped_storage()
            self.storages[id(storage)] = weakref.ref(storage)
            self.most = max(self.most, self.alive())
        return found

    def alive(self) -> int:
        there = {id(s): s.nbytes() for ref in self.storages.values() if (s := ref()) is not None}
        return sum(there.values())


@pytest.mark.parametrize(("layout", "fields", "counts", "zero1"), CASES[1::3])
def test_building_needs_the_part_and_a_piece(
    layout: Layout, fields: dict[str, Any], counts: tuple[int, ...], zero1: bool, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    for module in (initial, mersenne):
        monkeypatch.setattr(module, "PIECE", 256)
    config, plan = laid_out(layout, fields, counts)
    for rank in range(layout.world):
        torch.manual_seed(7)
        with Peak() as peak:
            parallel = Parallel(
                outline(config), on_paper(layout, rank), zero1, 1 << 14, plan, outline_on=CPU
            )
        buffers = sum(buffer.nbytes for buffer in parallel.model.buffers())
        own = sum(one.parameter.nbytes for one in parallel.named) + buffers
        laid_out_in = sum(bucket.flat.nbytes for bucket in parallel.buckets) + buffers
        kept = laid_out_in if parallel.zero1 else own
        small = 8 * len(parallel.named) + 4096  # stand-ins, and tables of the rotation
        assert own <= peak.most <= kept + 4 * 256 + small


def test_a_whole_model_is_seen_to_need_more() -> None:
    """What the test above would say of a rank that builds all and keeps a part."""
    layout = Layout(dp=4, ep=4)
    with Peak() as peak:
        parallel = Parallel(whole_of(tiny_config()), on_paper(layout, 0), False)
    assert peak.most > 1.5 * sum(one.parameter.nbytes for one in parallel.named)


def test_alone_an_outline_becomes_the_model() -> None:
    config = tiny_config()
    torch.manual_seed(7)
    check_part(Parallel(outline(config), outline_on=CPU), whole_of(config))


# --- in a world that answers -------------------------------------------------------------------------


def first_step(config: fathom.ModelConfig, from_outline: bool) -> dict[str, Tensor]:
    """Weights after a step that begins with either."""
    case = layouts.Case(layouts.dp(2, ep=2))
    torch.manual_seed(7)
    model = outline(config) if from_outline else fathom.Transformer(config)
    model.set_recompute(True)
    model.set_compute_dtype(torch.bfloat16)
    parallel = Parallel(model, Mesh(case.layout), outline_on=CPU if from_outline else None)
    trainer = layouts.Trainer.start(model, layouts.OptimConfig(), parallel=parallel)
    model.set_rope_scaling(YARN)
    plan = layouts.plan(case)
    plan.last_step = 1
    assert layouts.train_stage(trainer, plan, [])
    return {name: weight.clone() for name, weight in parallel.whole_weights()}


def both(config: fathom.ModelConfig) -> bool:
    one, other = first_step(config, True), first_step(config, False)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_step_from_an_outline_is_the_step_from_a_whole_model() -> None:
    """With all that is set after building."""
    config = tiny_config(num_hidden_layers=2, initializer_range=0.05)
    assert all(run(both, 2, config))
