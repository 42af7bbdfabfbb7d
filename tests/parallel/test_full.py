"""Full sharding beside its equality with one process (test_layouts.py): what it spares, sends and leaves."""

from __future__ import annotations

import gc
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fathom
from fathom.errors import ParallelError
from fathom.model import initial, mersenne
from fathom.model.attention import Attention
from fathom.model.initial import outline
from fathom.model.moe import Experts
from fathom.parallel import Layout, Mesh, Parallel
from fathom.parallel.building import holdings
from fathom.parallel.pieces import here, rows_of
from fathom.runs.saving import resume_run, save_run
from fathom.train import loop
from fathom.train.guard import GuardConfig
from fathom.train.loop import StepRecord, Trainer, train_stage
from fathom.train.optimizer import OptimConfig
from fathom.train.reading import summed
from tests.model.tiny import tiny_config
from tests.parallel.processes import run
from tests.parallel.test_building import Peak, same_memory
from tests.parallel.test_layouts import Case, dp, plan, start

FULL = Case(dp(2), full=True, dtype=torch.float32)


def steps(trainer: Trainer, last: int, case: Case = FULL) -> list[StepRecord]:
    """Train up to a step."""
    records: list[StepRecord] = []
    stage = plan(case)
    stage.last_step = last
    train_stage(trainer, stage, [lambda trainer, record: records.append(record)])
    return records


# --- memory --------------------------------------------------------------------------------------


def larger(full: bool) -> Trainer:
    """A model of which embedding and head are a small part, without an average."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 5}
    model = fathom.Transformer(tiny_config(**sizes))
    parallel = Parallel(model, Mesh(Layout(dp=4, ep=2)), full_shard=full)
    return Trainer.start(model, OptimConfig(), GuardConfig(), None, parallel)


def bytes_of_a_rank(full: bool) -> tuple[int, int, int]:
    """Of all tensors alive between steps, of the most parameters alive at once in a step, and of all parameters."""
    gc.freeze()  # what is from tests before this one is not looked at
    trainer = larger(full)
    steps(trainer, 1)
    parameters = storages(torch.nn.Parameter)  # FSDP fills and empties the same ones in every step
    most = [0]

    def look(*_: Any) -> None:
        most[0] = max(most[0], sum(storage.nbytes() for storage in parameters))

    for module in trainer.model.modules():
        if isinstance(module, Attention | Experts):
            module.register_forward_pre_hook(look)
    for name in ("linear", "grouped"):
        rule: Any = sys.modules[f"fathom.kernels.{name}"]
        rule._weight_gradient = before(look, rule._weight_gradient)
    steps(trainer, 2)
    gc.collect()
    whole = 4 * fathom.Transformer(trainer.model.config).num_parameters()
    return sum(storage.nbytes() for storage in storages(Tensor)), most[0], whole


def storages(kind: type) -> list[torch.UntypedStorage]:
    """The memory behind all tensors of a kind, each piece once."""
    found = {}
    for one in gc.get_objects():
        if kind in type(one).__mro__ and not hasattr(one, "to_local"):
            found[one.untyped_storage()._cdata] = one.untyped_storage()
    return list(found.values())


def before(look: Any, real: Any) -> Any:
    def looking(*given: Any) -> Any:
        look()
        return real(*given)

    return looking


def test_weights_and_moments_are_a_share_of_the_whole() -> None:
    """Three numbers to a parameter, a quarter of each; at a time two blocks are there, and what a whole pass needs."""
    for between, most, parameters in run(bytes_of_a_rank, 4, True):
        assert 0.99 * 3 * parameters / 4 < between < 1.05 * 3 * parameters / 4
        assert most < 0.5 * parameters


@pytest.mark.slow
def test_zero1_keeps_more() -> None:
    """All that is dense, half of the experts, and a quarter of two moments."""
    for between, most, parameters in run(bytes_of_a_rank, 4, False):
        assert between > parameters and most > 0.6 * parameters


# --- messages ------------------------------------------------------------------------------------


def bytes_sent(full: bool, micro_batches: int) -> int:
    """Bytes of parameters and gradients that a rank sends in a step."""
    trainer = larger(full)
    steps(trainer, 1)
    sent = [0]
    for name in ("all_gather_single", "all_gather_into_tensor"):
        setattr(dist, name, counted(getattr(dist, name, None), sent))
    for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
        setattr(dist, name, counted(getattr(dist, name, None), sent))
    steps(trainer, 2, replace(FULL, micro_batch=2 // micro_batches))
    return sent[0]


def counted(real: Any, sent: list[int]) -> Any:
    """A collective whose bytes are counted; None stays None, as in a torch that does not have it."""

    def collective(output: Tensor, given: Tensor, **more: Any) -> Any:
        sent[0] += abs(output.nbytes - given.nbytes)
        return real(output, given, **more)

    return real and collective


OUTSIDE = ("embed_tokens", "lm_head", "model.norm", "enorm", "hnorm", "eh_proj", "shared_head")


def at_the_ends(name: str) -> bool:
    """Whether a whole pass needs it."""
    return any(part in name for part in OUTSIDE)


def by_formula(full: bool, micro_batches: int) -> float:
    """(N - 1) / N of a parameter each time, N = 4 ranks, and of the half of the experts that two ranks hold 1 / 2."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 5}
    total = 0.0
    for name, parameter in fathom.Transformer(tiny_config(**sizes)).named_parameters():
        share = 1 / 2 * 1 / 2 if ".experts." in name else 3 / 4
        times = 2 if at_the_ends(name) else 3
        total += parameter.nbytes * share * (times * micro_batches if full else 2)
    return total


@pytest.mark.parametrize(
    ("full", "micro_batches"),
    [(True, 2), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((False, 2), (True, 1)))],
)
def test_it_sends_half_as_much_again_for_every_micro_batch(full: bool, micro_batches: int) -> None:
    """Blocks are gathered twice and their gradients summed; what a whole pass needs is gathered once."""
    expected = by_formula(full, micro_batches)
    for sent in run(bytes_sent, 4, full, micro_batches):
        assert expected <= sent < 1.05 * expected  # rows are padded to equal shares


# --- the same numbers ----------------------------------------------------------------------------


def gradients_in_bfloat16(full: bool) -> dict[str, Tensor]:
    """Of one micro-batch, in BF16 products of float32 weights."""
    torch.manual_seed(3)
    model = fathom.Transformer(tiny_config(initializer_range=0.05))
    model.set_compute_dtype(torch.bfloat16)
    parallel = Parallel(model, Mesh(Layout(dp=2)), zero1=False, full_shard=full)
    trainer = Trainer.start(model, OptimConfig(), parallel=parallel)
    at, mine = plan(FULL).moment(1), parallel.rows(8)
    batch = plan(FULL).loader.batch(mine.start, len(mine))
    parallel.reduce(loop.accumulate_gradients(trainer.model, batch, 4, at))
    return {name: gradient.clone() for name, gradient in parallel.whole_gradients()}


def test_experts_gathered_in_bfloat16_have_the_gradients_of_float32_ones() -> None:
    """They are rounded before they multiply in any case. Two addends have one sum, so all is equal bit for bit."""
    plain, full = run(gradients_in_bfloat16, 2, False)[0], run(gradients_in_bfloat16, 2, True)[0]
    assert plain.keys() == full.keys()
    for name, gradient in plain.items():
        assert gradient.any() and torch.equal(full[name], gradient), name


def reads_twice(full: bool) -> list[float]:
    """What is read before and after the weights are made smaller, without a step of training in between.

    Of so few rows that one process takes a short cut through the experts.
    """
    trainer = start(replace(FULL, full=full))
    parallel, model = trainer.parallel, trainer.model

    def read() -> list[float]:
        text = torch.arange(10).view(2, 5)
        return summed(model, [text], logits, model.config.vocab_size, False, parallel).tolist()

    before = read()
    with torch.no_grad():
        for piece in parallel.pieces:
            piece.part.mul_(0.5)
    parallel.share()
    return before + read()


def logits(model: fathom.Transformer, trunk: Any, rows: Any) -> Tensor:
    return model.lm_head(trunk.hidden).sum((0, 1))


def test_reading_gathers_what_is_newest() -> None:
    """What a pass without a backward pass has gathered is not what the next one computes with."""
    plain, full = run(reads_twice, 2, False)[0], run(reads_twice, 2, True)[0]
    assert full == pytest.approx(plain, rel=1e-4, abs=1e-5)


# --- what goes wrong in a run --------------------------------------------------------------------


def skips() -> list[tuple[bool, float]]:
    """Whether each step was skipped, and a weight after it; in step 3 one rank's loss is no number."""
    real = loop.micro_batches

    def spoilt(batch: Any, rows: int, whole: Any = None) -> Any:
        parts = real(batch, rows, whole)
        bad = dist.get_rank() == 1 and trainer.step == 2
        return [replace(part, targets=math.nan) for part in parts] if bad else parts

    loop.micro_batches = spoilt
    trainer = start(FULL)
    seen: list[tuple[bool, float]] = []
    stage = plan(FULL)
    stage.last_step = 4

    def note(trainer: Trainer, record: StepRecord) -> None:
        weights = dict(trainer.parallel.whole_weights())
        seen.append((record.skipped is not None, float(weights["lm_head.weight"].sum())))

    train_stage(trainer, stage, [note])
    return seen


def test_all_skip_a_step_that_is_no_number_on_one_rank() -> None:
    first, second = run(skips, 2)
    assert first == second
    skipped, weights = zip(*first, strict=True)
    assert skipped == (False, False, True, False)
    assert weights[2] == weights[1] and math.isfinite(weights[3]) and weights[3] != weights[2]


def goes_back(directory: Path) -> tuple[list[float], list[float]]:
    """Losses of steps 2 and 3, and again after the trainer was put back to step 1."""
    trainer = start(FULL)
    steps(trainer, 1)
    save_run(trainer, directory, 2, {})
    once = steps(trainer, 3)
    assert resume_run(trainer, directory, {}, print) and trainer.step == 1
    again = steps(trainer, 3)
    return [record.loss for record in once], [record.loss for record in again]


def test_a_roll_back_in_a_living_trainer(tmp_path: Path) -> None:
    for once, again in run(goes_back, 2, tmp_path):
        assert len(once) == 2 and once == again


# --- refused, and rows ---------------------------------------------------------------------------


def in_a_pipeline() -> str:
    with pytest.raises(ParallelError) as refused:
        Parallel(fathom.Transformer(tiny_config()), Mesh(Layout(pp=2)), full_shard=True)
    return str(refused.value)


def test_a_pipeline_is_refused() -> None:
    for said in run(in_a_pipeline, 2):
        assert "full sharding with pp = 2" in said and "use ZeRO-1" in said


@pytest.mark.parametrize(("rows", "ranks"), [(8, 4), (101, 4), (20, 8), (1, 3)])
def test_rows_are_cut_as_torch_cuts_them(rows: int, ranks: int) -> None:
    parts = torch.arange(rows).chunk(ranks)
    cut = [list(rows_of(place, rows, ranks)) for place in range(ranks)]
    assert [part.tolist() for part in parts] == [part for part in cut if part]
    assert [row for part in cut for row in part] == list(range(rows))


# --- made from an outline ------------------------------------------------------------------------


def in_shards() -> fathom.ModelConfig:
    """A model with norms of a single number, of which most ranks get nothing."""
    return tiny_config(num_hidden_layers=5, initializer_range=0.05, q_lora_rank=1)


def made(layout: Layout) -> tuple[dict[str, Tensor], int, int, int]:
    """Weights of a model made in shards, the most bytes on the way, those that stay, and those of the largest unit."""
    config = in_shards()
    mesh = Mesh(layout)
    initial.PIECE = mersenne.PIECE = 256
    torch.manual_seed(7)
    with Peak() as peak:
        parallel = Parallel(outline(config), mesh, full_shard=True, outline_on=torch.device("cpu"))
    for one in parallel.full._sharded.values() if parallel.full else ():
        assert same_memory(here(one.whole.detach()), one.part)
    own = sum(one.parameter.nbytes for one in parallel.named)
    outside = sum(p.nbytes for n, p in outline(config).named_parameters() if at_the_ends(n))
    return dict(parallel.whole_weights()), peak.most, own, outside


@pytest.mark.parametrize(
    "layout", [Layout(dp=4, ep=2), pytest.param(Layout(dp=2), marks=pytest.mark.slow)], ids=str
)
def test_a_rank_makes_its_shards_without_the_whole(layout: Layout) -> None:
    """A block at a time is there as a stand-in; the largest here is what lies at the ends."""
    torch.manual_seed(7)
    config = in_shards()
    whole = fathom.Transformer(config)
    for place, (weights, most, own, unit) in enumerate(run(made, layout.world, layout)):
        said = holdings(config, layout, full_shard=True, place=place)[0]
        assert own / 4 == said.weights == said.updated
        assert weights.keys() == dict(whole.named_parameters()).keys()
        for name, parameter in whole.named_parameters():
            assert torch.equal(weights[name], parameter), name
        assert own < most < 1.1 * (own + unit)
