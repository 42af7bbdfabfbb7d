"""Expert parallelism at the dispatcher seam (report §3.2.2): tokens travel to their experts' ranks.

A *hop* sends rows to the ranks of one group, each row once to every rank that holds one of its
experts, however many of them it holds. With a row travel its K routing weights (as K more columns,
so that one transfer carries both and their gradients) and its K *slots*: which of the receiver's
experts are wanted, -1 for those that are not its. Expert ids count within what the receiver and,
in the first of two hops, its node hold.

One hop goes over all of ep. Two go first across nodes, to the rank with this one's index on each
node that holds a wanted expert, then inside the node: over the slow network a token goes to a node
at most once, and with node-limited routing (§2.1.2, group = node) to `topk_group` nodes at most.

On the way back sums are made as early as possible. The expert's rank adds up its weighted results
of a row, in the order of choice; two hops do so again per node; the token's own rank adds up what
comes back, in the order of ranks. One process adds all K in the order of choice: the same numbers in
another order, which differ by rounding (in BF16 each partial sum is rounded once more).

The shared experts are computed while the first hop is under way, which in two hops is the slow one.

Shapes: N tokens here, R rows that arrived, S rows in expert order, K choices, D hidden, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fathom.errors import ParallelError
from fathom.parallel.all_to_all import Route, Traffic, send
from fathom.parallel.copies import Copies, occurrences
from fathom.parallel.mesh import Group, Mesh


class Hop:
    """From one rank to those of a group, each holding `experts` consecutive ones."""

    def __init__(self, name: str, group: Group, experts: int, traffic: Traffic) -> None:
        self.name, self.group, self.experts, self.traffic = name, group, experts, traffic

    def begin(self, rows_NX: Tensor, slots_NK: Tensor) -> Leg:
        """Send rows to wherever their slots say."""
        owner_NK = slots_NK.div(self.experts, rounding_mode="floor")  # -1 stays -1
        source_L, owner_L = self._wanted(owner_NK).nonzero(as_tuple=True)
        copies = Copies.sort(source_L, owner_L, rows_NX.shape[0])
        out_G = occurrences(owner_L, self.group.size)
        route = Route.agree(self.group, out_G, self.name, self.traffic)
        return Leg(route, copies, rows_NX, self._slots(slots_NK, owner_NK, copies, out_G))

    def _wanted(self, owner_NK: Tensor) -> Tensor:
        """Which ranks a row goes to: bool [N, G]."""
        wanted = owner_NK.new_zeros(owner_NK.shape[0], self.group.size + 1, dtype=torch.bool)
        return wanted.scatter_(1, owner_NK + 1, True)[:, 1:]

    def _slots(self, slots_NK: Tensor, owner_NK: Tensor, copies: Copies, out_G: Tensor) -> Tensor:
        """Each copy's slots as its receiver counts its experts, int32 [S, K]."""
        ranks_G = torch.arange(self.group.size, device=out_G.device)
        to_S = ranks_G.repeat_interleave(out_G, output_size=len(copies.source_S))[:, None]
        slots_SK, owner_SK = slots_NK[copies.source_S], owner_NK[copies.source_S]
        theirs = slots_SK - to_S * self.experts
        return theirs.masked_fill(owner_SK != to_S, -1).to(torch.int32)


class Leg:
    """One hop of one dispatch, out and back; `rows` and `results` are what is under way."""

    def __init__(self, route: Route, copies: Copies, rows_NX: Tensor, slots_SK: Tensor) -> None:
        self.route, self.copies = route, copies
        self._slots = send(slots_SK, route, "routing")
        self.rows = send(copies.make(rows_NX), route, "dispatch")

    def wait(self) -> tuple[Tensor, Tensor]:
        """What arrived: rows [R, X] and their slots int64 [R, K]."""
        slots_RK, rows_RX = self._slots.wait(), self.rows.wait()
        del self._slots, self.rows
        return rows_RX, slots_RK.long()

    def begin_back(self, results_RD: Tensor) -> None:
        """Send the results of the rows that arrived to where those came from."""
        self.results = send(results_RD, self.route.reverse(), "combine")

    def end_back(self) -> Tensor:
        """Sum of each row's results, once they are there: [N, D]."""
        returned_SD = self.results.wait()
        del self.results
        return self.copies.sum(returned_SD)


class SentToExperts:
    """Tokens on their way; `wait` once, then `combine`."""

    def __init__(
        self, hops: list[Hop], experts: int, x_ND: Tensor, slots_NK: Tensor, weights_NK: Tensor
    ) -> None:
        self.sizes = [x_ND.shape[1], weights_NK.shape[1]]
        self.experts, self.onward = experts, hops[1:]
        payload = torch.cat((x_ND, weights_NK.to(x_ND.dtype)), dim=1)
        self.legs = [hops[0].begin(payload, slots_NK)]
        self.copies: Copies
        self.weights_L: Tensor

    def wait(self) -> tuple[Tensor, Tensor]:
        """Rows sorted by this rank's experts [S, D] and rows of each, int64."""
        rows, slots_RK = self.legs[0].wait()
        for hop in self.onward:
            self.legs.append(hop.begin(rows, slots_RK))
            rows, slots_RK = self.legs[-1].wait()
        x_RD, weights_RK = rows.split(self.sizes, dim=1)
        source_L, choice_L = (slots_RK >= 0).nonzero(as_tuple=True)
        expert_L = slots_RK[source_L, choice_L]
        self.copies = Copies.sort(source_L, expert_L, x_RD.shape[0])
        self.weights_L = weights_RK[source_L, choice_L]
        return self.copies.make(x_RD), occurrences(expert_L, self.experts)


class ExpertParallelDispatcher:
    """Stands where `model.moe.LocalDispatcher` stood, in every MoE block of a model over `mesh.ep`."""

    def __init__(self, mesh: Mesh, experts: int, traffic: Traffic | None = None) -> None:
        """`experts`: how many routed ones the layer has in all, a multiple of ep.

        Raises `ParallelError` where they are all here.
        """
        if mesh.ep.size == 1:
            raise ParallelError(
                "parallel.ep = 1 keeps all experts here, there is nobody to send tokens to; leave LocalDispatcher in "
                "its place"
            )
        self.traffic = traffic or Traffic()
        self.here = experts // mesh.ep.size
        if mesh.across.size > 1 and mesh.node.size > 1:
            node = experts // mesh.across.size
            self.hops = [
                Hop("across", mesh.across, node, self.traffic),
                Hop("node", mesh.node, self.here, self.traffic),
            ]
        else:
            self.hops = [Hop("ep", mesh.ep, self.here, self.traffic)]

    def dispatch(
        self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, counts_E: Tensor
    ) -> SentToExperts:
        """Begin to send each token to the ranks of its experts; all ranks of ep together."""
        return SentToExperts(self.hops, self.here, x_ND, indices_NK, weights_NK)

    def combine(self, rows_RD: Tensor, sent: SentToExperts) -> Tensor:
        """Weighted sum [N, D] of what the experts made of each token."""
        self.begin_combine(rows_RD, sent)
        return self.end_combine(sent)

    def begin_combine(self, rows_RD: Tensor, sent: SentToExperts) -> None:
        """Combine up to the last transfer, which is then under way; there is time for something else."""
        results = sent.copies.sum(rows_RD, sent.weights_L)
        for leg in reversed(sent.legs[1:]):
            leg.begin_back(results)
            results = leg.end_back()
        sent.legs[0].begin_back(results)

    def end_combine(self, sent: SentToExperts) -> Tensor:
        """What `combine` gives, after `begin_combine`."""
        return sent.legs[0].end_back()
