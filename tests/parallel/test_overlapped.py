"""Pairs interleaved, against the same schedule with forward and backward one after the other: the same bits."""

from __future__ import annotations

import random
import time
import weakref
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fathom.errors import ScheduleError
from fathom.kernels.put_off import PutOff
from fathom.model.objective import Rows
from fathom.parallel import OVERLAPPED_ORDER, POSTED_EARLY, Layout, Mesh, all_to_all
from fathom.parallel.all_to_all import Route
from fathom.parallel.experts import shard_experts, sharded_names
from fathom.parallel.pipeline import Pipeline, Plan, executor
from fathom.parallel.pipeline.lanes import Lane
from fathom.parallel.pipeline.layers import DenseLayer
from fathom.parallel.pipeline.overlapped import Chunk
from fathom.parallel.pipeline.seams import Seam, differentiate
from fathom.parallel.pipeline.stages import Stage, Whole
from fathom.parallel.schedules.overlap import NEEDS, ONE_AFTER_THE_OTHER, Operation, Order
from tests.model.tiny import tiny_config
from tests.parallel.processes import run
from tests.parallel.test_pipeline import WEIGHTS, alone, micro_batches, model_of

Answer = tuple[dict[str, Tensor], list[Tensor], dict[str, Tensor]]


def pipeline_of(
    name: str, ep: int, dtype: torch.dtype, changes: dict[str, Any]
) -> tuple[Pipeline, Mesh]:
    """Two ranks of pipeline times `ep` of data."""
    mesh = Mesh(Layout(pp=2, dp=ep, ep=ep))
    model = model_of(dtype, changes)
    shard_experts(model, mesh)
    return Pipeline(model, Plan(model.config, 2, name), mesh.pp), mesh


def seen_in(pipeline: Pipeline, mesh: Mesh, count: int) -> Answer:
    """Gradients, losses and loads of a step; each rank of dp has its own micro-batches."""
    model = pipeline.model
    model.zero_grad()
    mine = micro_batches(count * mesh.dp.size, True)[mesh.dp.place :: mesh.dp.size]
    seen = pipeline.run(mine, WEIGHTS)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    loads = {n: b.clone() for n, b in model.named_buffers() if n.endswith("expert_load")}
    for name, buffer in model.named_buffers():
        if name.endswith("expert_load"):
            buffer.zero_()
    return gradients, [seen.main, seen.mtp, seen.balance, seen.expert_load], loads


def same(one: Answer, other: Answer) -> bool:
    """To the bit."""
    assert one[0].keys() == other[0].keys()
    pairs = [(one[0][n], other[0][n]) for n in one[0]] + [(one[2][n], other[2][n]) for n in one[2]]
    pairs += list(zip(one[1], other[1], strict=True))
    return all(torch.equal(a, b) for a, b in pairs)


def compare(
    name: str, ep: int, orders: list[Order], dtype: torch.dtype, changes: dict[str, Any]
) -> tuple[list[bool], Answer]:
    """Which orders give the bits of the run without one; the answer of the last."""
    pipeline, mesh = pipeline_of(name, ep, dtype, changes)
    expected, found = seen_in(pipeline, mesh, 8), []
    for order in orders:
        pipeline.plan = replace(pipeline.plan, order=order)
        answer = seen_in(pipeline, mesh, 8)
        found.append(same(answer, expected))
    return found, answer


def distances(
    answers: list[Answer], dtype: torch.dtype, changes: dict[str, Any], names: set[str]
) -> dict[str, float]:
    """Of the gradients of four ranks, pp 2 with ep 2, to those of one process that takes all micro-batches."""
    model = model_of(dtype, changes)
    found = {}
    for key, theirs in alone(model, micro_batches(16, True))[0].items():
        places = [
            sum(answer[0][key] for answer in answers[place::2] if key in answer[0])
            for place in (0, 1)
        ]
        ours = torch.cat(places) if key in names else sum(places)
        found[key] = float((ours - theirs).norm() / theirs.norm())
    return found


DENSE_FIRST = {"recompute": True, "first_k_dense_replace": 3}
"""Dense layers in one stage only, and not in all of its layers; one MTP module."""


def check(name: str, orders: list[Order], dtype: torch.dtype, changes: dict[str, Any]) -> None:
    answers = run(compare, 4, name, 2, orders, dtype, changes)
    assert all(all(found) for found, _ in answers), [found for found, _ in answers]
    names = sharded_names(model_of(dtype, changes))
    far = distances([answer for _, answer in answers], dtype, changes, names)
    assert max(far.values()) <= (1e-12 if dtype == torch.float64 else 1e-5), far


@pytest.mark.parametrize("name", ["DualPipe", "DualPipeV"])
def test_interleaved_pairs_give_the_same_bits_and_the_gradients_of_one_process(name: str) -> None:
    check(name, [OVERLAPPED_ORDER, POSTED_EARLY], torch.float64, DENSE_FIRST)


def any_order(rng: random.Random) -> Order:
    """One that respects what operations need."""
    left, order = sorted(OVERLAPPED_ORDER), []
    while left:
        order.append(
            rng.choice([one for one in left if one not in NEEDS or NEEDS[one] not in left])
        )
        left.remove(order[-1])
    return order


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        DENSE_FIRST,
        {"n_shared_experts": 0, "num_nextn_predict_layers": 2},
        {"num_hidden_layers": 5, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0},
        {"tie_word_embeddings": True, "scoring_func": "softmax", "recompute": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["DualPipe", "DualPipeV"])
def test_any_order_and_many_shapes(name: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    rng = random.Random(4)
    orders = [ONE_AFTER_THE_OTHER, OVERLAPPED_ORDER, *(any_order(rng) for _ in range(4))]
    check(name, orders, dtype, changes)


def test_without_experts_elsewhere_nothing_is_interleaved() -> None:
    for kinds in run(kinds_of_runs, 2):
        assert kinds == {Whole}


def kinds_of_runs() -> set[type]:
    """What takes micro-batches through stages when all experts are here."""
    pipeline, mesh = pipeline_of("DualPipeV", 1, torch.float32, {})
    pipeline.plan = replace(pipeline.plan, order=POSTED_EARLY)
    begin, kinds = executor._Running._begin, set()

    def begun(self: Any, action: Any) -> Whole | Chunk:
        kinds.add(type(found := begin(self, action)))
        return found

    executor._Running._begin = begun  # type: ignore[method-assign]
    seen_in(pipeline, mesh, 8)
    return kinds


def test_an_order_that_cannot_be_is_refused() -> None:
    with pytest.raises(ScheduleError, match="ten operations, each once"):
        Plan(tiny_config(), 1, "DualPipeV", order=OVERLAPPED_ORDER[1:])


# --- what is under way while something is computed -------------------------------------------------


def written_down(order: Order) -> list[str]:
    """Operations of the first pair of a one-rank pipeline, with what they post and what they wait for."""
    mesh = Mesh(Layout(dp=2, ep=2))
    changes = {"num_hidden_layers": 3, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    model = model_of(torch.float32, changes)
    shard_experts(model, mesh)
    pipeline = Pipeline(model, Plan(model.config, 1, "DualPipeV", (1, 2), order), mesh.pp)
    log: list[str] = []
    post, finish, operate, pair = Route.post, all_to_all._finish, Chunk.run, executor.interleave

    def posted(self: Route, rows: Tensor, load: str):  # type: ignore[no-untyped-def]
        log.append(f"post {load}")
        under_way = post(self, rows, load)
        return under_way[0], (under_way[1], load)

    def finished(under_way: Any) -> None:
        log.append(f"wait {under_way[1]}")
        finish(under_way[0])

    def operated(self: Chunk, layer: DenseLayer, operation: Operation) -> None:
        log.append("{1}({0})".format(*operation))
        operate(self, layer, operation)

    def paired(*arguments: Any) -> None:
        log.append("pair")
        pair(*arguments)
        log.append("end")

    Route.post, Chunk.run = posted, operated  # type: ignore[assignment, method-assign]
    all_to_all._finish, executor.interleave = finished, paired
    pipeline.run(micro_batches(2, False), WEIGHTS)
    log = [one for one in log if not one.endswith("routing")]
    return log[log.index("pair") + 1 : log.index("end")]


@pytest.mark.parametrize("order", [OVERLAPPED_ORDER, POSTED_EARLY])
def test_what_is_posted_and_waited_for_where(order: Order) -> None:
    """Two layers forward, one backward: what needs the rows of an all-to-all waits for them, nothing else does."""
    log = run(written_down, 2, order)[0]
    assert [one for one in log if "(" in one] == [
        *(f"{what}({kind})" for kind, what in order),
        *(f"{what}({kind})" for kind, what in order if kind == "F"),
    ]
    within: dict[str, Counter[str]] = {}
    for one in log:
        if "(" in one:
            at = one
            within.setdefault(at, Counter())
        else:
            within[at][one] += 1
    assert within == {
        "attention(F)": Counter({"wait combine": 1}),  # of the layer before
        "dispatch(F)": Counter({"post dispatch": 2}),
        "mlp(F)": Counter({"wait dispatch": 2}),
        "combine(F)": Counter({"post combine": 2}),
        "combine(B)": Counter({"post combine gradient": 1}),
        "mlp(B)": Counter({"wait combine gradient": 1}),
        "mlp(W)": Counter(),
        "dispatch(B)": Counter({"post dispatch gradient": 1}),
        "attention(B)": Counter({"wait dispatch gradient": 1}),
        "attention(W)": Counter(),
    }


# --- seams -----------------------------------------------------------------------------------------


def test_a_graph_in_two_halves_has_the_gradient_of_the_whole() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    middle = x.exp()
    (middle * middle.sin()).sum().backward()
    expected, x.grad = x.grad, None
    seam = Seam()
    middle = seam.cut(x.exp())
    (middle * middle.sin()).sum().backward()
    assert x.grad is None
    differentiate(seam)
    assert torch.equal(x.grad, expected)  # type: ignore[arg-type]
    assert seam.edge is None and seam.gradient is None


def test_a_seam_keeps_no_numbers() -> None:
    """Neither end of it holds the tensor; only what a rule keeps stays, as in one graph."""
    weight = torch.ones(8, requires_grad=True)
    before = weight * 2
    seam = Seam()
    behind = seam.cut(before)
    result = behind + 1  # which keeps nothing
    numbers = weakref.ref(before.untyped_storage())
    assert numbers() is not None
    del before, behind
    assert numbers() is None
    result.sum().backward()
    differentiate(seam)
    assert torch.equal(weight.grad, torch.full((8,), 2.0))  # type: ignore[arg-type]


def test_memory_of_a_chunk_is_that_of_one_graph() -> None:
    """With recomputation, seams must not keep what it is there to drop."""
    kept = run(bytes_kept, 2)[0]
    assert 0 < kept["chunk"] <= kept["whole"] * 1.01, kept


class Made(TorchDispatchMode):
    """Watches everything that is allocated within."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[id(storage)] = weakref.ref(storage)
        return found

    def left(self) -> int:
        """Bytes of it that stay: gloo's threads let go of what they sent a little later than `wait` returns."""
        readings = []
        for _ in range(20):
            readings.append(self._alive())
            time.sleep(0.02)
        return min(readings)

    def _alive(self) -> int:
        found = {id(s): s.nbytes() for ref in self.storages.values() if (s := ref()) is not None}
        return sum(found.values())


def bytes_kept() -> dict[str, int]:
    """What a forward pass leaves allocated for the backward pass, by how the micro-batch is run."""
    mesh = Mesh(Layout(dp=2, ep=2))
    model = model_of(torch.float32, {"recompute": True})
    shard_experts(model, mesh)
    put_off = PutOff()
    stage = Stage(model, range(2, 9), False)
    rows = Rows.of(torch.randint(0, 101, (2, 65)), None)
    x = torch.randn(2, 64, model.config.hidden_size)
    found = {}
    for name in ("whole", "chunk"):
        runs: list[Whole | Chunk] = [Whole(stage, rows, WEIGHTS, put_off)]
        if name == "chunk":
            runs = [Chunk(stage, rows, WEIGHTS, put_off, Lane(None), POSTED_EARLY)]
        with Made() as made:
            runs[0].forward(x)
        found[name] = made.left()
        runs[0].backward(torch.ones_like(x), 1.0, 1.0, None)
    return found
