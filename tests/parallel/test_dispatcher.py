"""Expert parallelism against the local dispatcher: outputs, gradients, bytes, and what overlaps.

Each world is forked once and tries many random shapes; the seed of one that fails is in its message.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fathom
from fathom.errors import ParallelError
from fathom.model.moe import Experts, LocalDispatcher
from fathom.parallel import ExpertParallelDispatcher, Layout, Mesh
from fathom.parallel.all_to_all import Route, Traffic, send
from fathom.parallel.copies import Copies, occurrences
from fathom.parallel.experts import local_experts
from fathom.parallel.waiting import waited
from tests.model.tiny import tiny_config
from tests.parallel.processes import run


@dataclass
class Case:
    """Tokens of all ranks and where they go, the same on every rank."""

    x_ND: Tensor
    indices_NK: Tensor
    weights_NK: Tensor
    cotangent_ND: Tensor
    experts: Experts
    starts: list[int]
    """Where each rank's tokens begin, and the end."""

    def mine(self, rank: int) -> slice:
        return slice(self.starts[rank], self.starts[rank + 1])


def case(seed: int, layout: Layout, dtype: torch.dtype) -> Case:
    """Some ranks have no token, and in some cases some get none."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    D, K = rng.choice((4, 8, 12)), rng.choice((1, 2, 3))
    E = layout.ep * rng.choice((1, 2, 3))
    K = min(K, E)
    lengths = [rng.choice((0, 1, 5, 16)) for _ in range(layout.world)]
    N = sum(lengths)
    favoured = rng.sample(range(E), rng.randint(K, E))
    choice = torch.rand(N, E)
    choice[:, favoured] += 1
    config = tiny_config(
        hidden_size=D, moe_intermediate_size=4, n_routed_experts=E, num_experts_per_tok=K,
        n_group=1, topk_group=1,
    )  # fmt: skip
    experts = Experts(config).to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    starts = [sum(lengths[:i]) for i in range(layout.world + 1)]
    x, weights, cotangent = torch.randn(N, D), torch.rand(N, K), torch.randn(N, D)
    indices = choice.topk(K).indices
    return Case(x.to(dtype), indices, weights.to(dtype), cotangent.to(dtype), experts, starts)


def through(
    case: Case,
    dispatcher: ExpertParallelDispatcher | LocalDispatcher,
    rows: slice,
    experts: Experts,
) -> list[Tensor]:
    """Output of some tokens, and gradients of tokens, weights and experts."""
    x = case.x_ND[rows].clone().requires_grad_()
    weights = case.weights_NK[rows].clone().requires_grad_()
    indices = case.indices_NK[rows]
    counts = torch.bincount(indices.flatten(), minlength=case.experts.down_proj.shape[0])
    experts.zero_grad()
    sent = dispatcher.dispatch(x, indices, weights, counts)
    out = dispatcher.combine(experts(*sent.wait()), sent)
    (out * case.cotangent_ND[rows]).sum().backward()
    gradients = (
        p.grad if p.grad is not None else torch.zeros_like(p) for p in experts.parameters()
    )
    return [out.detach(), x.grad, weights.grad, *gradients]  # type: ignore[list-item]


def close(a: Tensor, b: Tensor, tolerance: float, seed: int) -> None:
    """||a - b|| <= tolerance ||b||."""
    assert a.shape == b.shape and a.dtype == b.dtype
    difference = (a.double() - b.double()).norm()
    assert difference <= tolerance * b.double().norm(), f"seed {seed}: {difference / b.norm()}"


def compare(layout: Layout, seeds: range, dtype: torch.dtype, tolerance: float) -> int:
    """Everything equal to one process on random cases; the most rows that travelled in one."""
    mesh = Mesh(layout)
    most = 0
    for seed in seeds:
        one = case(seed, layout, dtype)
        E = one.experts.down_proj.shape[0]
        here = local_experts(E, mesh)
        part = Experts(tiny_config(n_routed_experts=layout.ep * 8)).to(dtype)
        for name, whole in one.experts.named_parameters():
            setattr(part, name, nn.Parameter(whole.detach()[here.start : here.stop].clone()))
        mine = one.mine(mesh.rank)
        found = through(one, ExpertParallelDispatcher(mesh, E), mine, part)
        expected = through(one, LocalDispatcher(), slice(None), one.experts)
        for a, b in zip(found[:3], expected[:3], strict=True):
            close(a, b[mine], tolerance, seed)
        for a, b in zip(found[3:], expected[3:], strict=True):
            close(mesh.replicas.sum(a), b[here.start : here.stop], tolerance, seed)
        most = max(most, one.x_ND.shape[0])
    return most


WORLDS = [
    Layout(dp=2, ep=2),
    Layout(dp=4, ep=4),
    Layout(dp=4, ep=2),
    Layout(dp=4, ep=4, devices_per_node=2),
    Layout(dp=4, ep=4, devices_per_node=1),
    Layout(dp=8, ep=8, devices_per_node=2),
]


@pytest.mark.parametrize("layout", WORLDS, ids=str)
def test_equals_one_process_in_float64(layout: Layout) -> None:
    most = run(compare, layout.world, layout, range(12), torch.float64, 1e-12)
    assert min(most) > 10


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_equals_one_process_in_two_hops(dtype: torch.dtype, tolerance: float) -> None:
    layout = Layout(dp=4, ep=4, devices_per_node=2)
    run(compare, 4, layout, range(12), dtype, tolerance)


def test_one_rank_has_nobody_to_send_to() -> None:
    with pytest.raises(ParallelError, match="ep = 1 keeps all experts here"):
        ExpertParallelDispatcher(Mesh.alone(), 8)


# --- bytes ---------------------------------------------------------------------------------------


def sent_bytes(layout: Layout, seed: int) -> tuple[dict, dict]:
    mesh = Mesh(layout)
    one = case(seed, layout, torch.float32)
    E = one.experts.down_proj.shape[0]
    here = local_experts(E, mesh)
    part = Experts(tiny_config(n_routed_experts=layout.ep * 8))
    for name, whole in one.experts.named_parameters():
        setattr(part, name, nn.Parameter(whole.detach()[here.start : here.stop].clone()))
    dispatcher = ExpertParallelDispatcher(mesh, E)
    through(one, dispatcher, one.mine(mesh.rank), part)
    return dict(dispatcher.traffic.bytes), by_formula(one, layout, mesh.rank)


def by_formula(one: Case, layout: Layout, me: int) -> dict[tuple[str, str], int]:
    """The same from the choices alone, written as the report says it: a token once to each node that it needs, and
    there once to each device."""
    D, K = one.x_ND.shape[1], one.indices_NK.shape[1]
    device, here = layout.ep // layout.nodes, one.experts.down_proj.shape[0] // layout.ep
    legs: dict[str, list[tuple[int, int]]] = (
        {"across": [], "node": []} if layout.nodes > 1 else {"ep": []}
    )
    group = me // layout.ep * layout.ep
    for rank in range(group, group + layout.ep):
        for chosen in one.indices_NK[one.mine(rank)].tolist():
            owners = {group + expert // here for expert in chosen}
            if layout.nodes == 1:
                legs["ep"] += [(rank, owner) for owner in owners]
                continue
            gates = {owner // device * device + rank % device for owner in owners}
            legs["across"] += [(rank, gate) for gate in gates]
            legs["node"] += [
                (gate, owner) for gate in gates for owner in owners
                if owner // device == gate // device
            ]  # fmt: skip
    sizes = {"across": layout.nodes, "node": device, "ep": layout.ep}
    expected = {}
    for hop, pairs in legs.items():
        out = sum(a == me and b != me for a, b in pairs)
        back = sum(b == me and a != me for a, b in pairs)
        expected[hop, "routing"] = out * 4 * K + 8 * (sizes[hop] - 1)
        expected[hop, "dispatch"] = out * 4 * (D + K)
        expected[hop, "dispatch gradient"] = back * 4 * (D + K)
        expected[hop, "combine"] = back * 4 * D
        expected[hop, "combine gradient"] = out * 4 * D
    return expected


@pytest.mark.parametrize(
    "layout", [Layout(dp=4, ep=4), Layout(dp=4, ep=4, devices_per_node=2)], ids=str
)
def test_bytes_equal_the_formula(layout: Layout) -> None:
    for rank, (counted, expected) in enumerate(run(sent_bytes, 4, layout, 3)):
        assert counted == expected, rank
        assert sum(expected.values()) > 0


def rows_across(topk_group: int) -> list[int]:
    """Rows that go to each node, this one included, for 50 tokens whose groups of experts are the two nodes'."""
    config = tiny_config(n_group=2, topk_group=topk_group, num_experts_per_tok=3)
    mesh = Mesh(Layout(dp=4, ep=4, devices_per_node=2))
    torch.manual_seed(mesh.rank)
    indices, weights = fathom.route(torch.randn(50, 8), torch.zeros(8), config)
    dispatcher = ExpertParallelDispatcher(mesh, 8)
    sent = dispatcher.dispatch(torch.randn(50, 4), indices, weights, torch.empty(0))
    sent.wait()
    return list(sent.legs[0].route.out)


def test_node_limited_routing_limits_what_is_sent() -> None:
    assert all(sum(rows) == 50 and min(rows) > 0 for rows in run(rows_across, 4, 1))
    assert all(50 < sum(rows) <= 100 for rows in run(rows_across, 4, 2))


# --- in flight -----------------------------------------------------------------------------------


class Note(torch.autograd.Function):
    """Identity that writes down when it runs, and when it is differentiated."""

    @staticmethod
    def forward(ctx, x: Tensor, log: list[str], name: str) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.log, ctx.name = log, name
        log.append(name)
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        ctx.log.append(f"{ctx.name} gradient")
        return grad, None, None


def in_flight() -> list[str]:
    """What happens while rows are under way, forward and backward."""
    log: list[str] = []
    group = Mesh(Layout(dp=2, ep=2)).ep
    route = Route.agree(group, torch.tensor([1, 2]), "ep", Traffic())
    post, wait = Route.post, dist.Work.wait

    def posted(self: Route, rows: Tensor, load: str):  # type: ignore[no-untyped-def]
        log.append(f"post {load}")
        return post(self, rows, load)

    def waited(self: dist.Work, *arguments):  # type: ignore[no-untyped-def]
        log.append("there")
        return wait(self, *arguments)

    Route.post, dist.Work.wait = posted, waited  # type: ignore[method-assign,assignment]
    x = torch.ones(3, 2, requires_grad=True)
    flight = send(x * 1, route, "dispatch")
    shared = Note.apply(x, log, "shared expert")
    (Note.apply(flight.wait(), log, "experts").sum() + shared.sum()).backward()
    return log


def test_the_shared_expert_is_computed_and_differentiated_while_rows_are_under_way() -> None:
    assert run(in_flight, 2)[0] == [
        "post dispatch", "shared expert", "there", "experts",
        "experts gradient", "post dispatch gradient", "shared expert gradient", "there",
    ]  # fmt: skip


def waited_for_a_late_one() -> float:
    group, before = Mesh(Layout(dp=2, ep=2)).ep, waited()
    dist.barrier()
    time.sleep(0.4 * group.place)
    Route.agree(group, torch.tensor([1, 2]), "ep", Traffic())
    return waited() - before


def test_where_ranks_meet_first_in_a_layer_their_waiting_counts() -> None:
    """Else the ranks that wait for a slow one would seem as slow."""
    early, late = run(waited_for_a_late_one, 2)
    assert early - late > 0.2


# --- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [[3, 0, 3, 3, 1], []])
def test_occurrences_are_counted_as_bincount_does(numbers: list[int]) -> None:
    one = torch.tensor(numbers, dtype=torch.int64)
    assert torch.equal(occurrences(one, 5), torch.bincount(one, minlength=5))


def test_copies_and_their_sums_have_each_others_gradients() -> None:
    torch.manual_seed(1)
    wanted = torch.rand(7, 4) < 0.5
    wanted[2] = False
    source, key = wanted.nonzero(as_tuple=True)
    copies = Copies.sort(source, key, 7)
    assert copies.source_S.tolist() == [n for k in range(4) for n in range(7) if wanted[n, k]]
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(len(source), dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(copies.sum(copies.make(x)), x * wanted.sum(1, keepdim=True))
    assert torch.autograd.gradcheck(copies.make, (x,))
    rows = torch.randn(len(source), 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(copies.sum, (rows, weights))
    assert torch.autograd.gradcheck(copies.sum, (rows,))
