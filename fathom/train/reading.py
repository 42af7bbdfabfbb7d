"""Reading text without learning from it, on however many ranks: what held-out loss and loss by position have in common.

Every rank of data parallelism reads its share of the windows, and a pipeline passes them through its stages. With
expert parallelism each forward pass is a conversation of several ranks, so all make as many passes, over rows as long:
a rank for which no row is left reads the first one again, and what is found there does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from fathom.model import Transformer
from fathom.model.objective import Rows
from fathom.parallel import Parallel
from fathom.parallel.mesh import Group, Mesh
from fathom.parallel.pipeline import Measure, read


@torch.no_grad()
def summed(
    model: Transformer,
    batches: Iterable[Tensor],
    measure: Measure,
    size: int,
    mtp: bool,
    parallel: Parallel | None = None,
) -> Tensor:
    """Sum over all batches (int64 [B, T + 1]) of the `size` numbers that `measure` finds; float64 [size].

    All ranks together with the same batches, and all of them get the sum.
    """
    mesh = parallel.mesh if parallel else Mesh.alone()
    pipeline = parallel.pipeline if parallel else None
    device, was_training = next(model.parameters()).device, model.training
    total = torch.zeros(size, dtype=torch.float64)
    model.eval()
    for some in _some(batches, 2 * pipeline.plan.stages if pipeline else 1):
        mine = [_share(tokens, mesh.dp) for tokens in some]
        rows = [Rows.of(tokens.to(device), None) for tokens, _ in mine]
        if pipeline:
            found = read(pipeline, rows, measure, mtp)
        else:
            found = [measure(model, model.trunk(one.inputs, mtp=mtp), one) for one in rows]
        for numbers, (_, counts) in zip(found, mine, strict=False):  # none before the last stage
            total += numbers.cpu().double() * counts
    model.train(was_training)
    if parallel:
        parallel.release()
    if mesh.world.size == 1:
        return total
    return mesh.world.sum(total.to(device)).cpu()


def _some(batches: Iterable[Tensor], count: int) -> Iterator[list[Tensor]]:
    """So many batches at a time."""
    rest = iter(batches)
    while some := list(islice(rest, count)):
        yield some


def _share(tokens: Tensor, group: Group) -> tuple[Tensor, bool]:
    """A rank's rows of a batch, and whether they count."""
    mine = torch.tensor_split(tokens, group.size)[group.place]
    return (mine, True) if len(mine) else (tokens[:1], False)
