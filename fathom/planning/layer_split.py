"""Which layers a stage of a pipeline gets: whole layers in order, so that the heaviest rank is as light as can be.

The report does not publish its own split. Layers are weighed by their operations; head, loss and MTP modules are a tail
that only the last stage can have. First stages are evened out alone, then single layers are moved as long as that
helps ranks that hold two stages (DualPipe, DualPipeV, ZBV) or more (interleaved).
"""

from __future__ import annotations

from functools import cache

from fathom.model import ModelConfig
from fathom.planning.flops import block_flops, head_flops, join_flops

SEQ_LEN_OF_SPLIT = 4096
"""Where layers weigh differently only by attention it hardly matters; the report trains at this length."""


def split_layers(
    config: ModelConfig, mtp: bool, ranks: tuple[tuple[int, ...], ...]
) -> tuple[int, ...]:
    """Main layers of each stage; `ranks` says which stages a rank holds."""
    depth = config.num_nextn_predict_layers if mtp else 0
    moe = [config.is_moe_layer(i) for i in range(config.num_hidden_layers + depth)]
    kinds = {
        kind: block_flops(config, moe.index(kind), SEQ_LEN_OF_SPLIT) for kind in dict.fromkeys(moe)
    }
    weights = [kinds[kind] for kind in moe]
    layers = tuple(weights[: config.num_hidden_layers])
    ends = head_flops(config) + depth * (join_flops(config) + head_flops(config))
    tail = ends + sum(weights[config.num_hidden_layers :])
    count = 1 + max(map(max, ranks))
    return _balanced(even_split(layers, tail, count), layers, tail, ranks)


@cache
def _balanced(
    counts: tuple[int, ...],
    weights: tuple[float, ...],
    tail: float,
    ranks: tuple[tuple[int, ...], ...],
) -> tuple[int, ...]:
    """Move single layers from stage to stage as long as that lightens the heaviest rank, then its heaviest stage."""
    best, weight = counts, _weight(counts, weights, tail, ranks)
    while True:
        moves = (
            _moved(best, source, target)
            for source in range(len(best))
            if best[source] > (source < len(best) - 1)
            for target in range(len(best))
            if source != target
        )
        weighed = min(((_weight(move, weights, tail, ranks), move) for move in moves), default=None)
        if weighed is None or weighed[0] >= weight:
            return best
        weight, best = weighed


def _moved(counts: tuple[int, ...], source: int, target: int) -> tuple[int, ...]:
    return tuple(
        count - (number == source) + (number == target) for number, count in enumerate(counts)
    )


def _weight(
    counts: tuple[int, ...],
    weights: tuple[float, ...],
    tail: float,
    ranks: tuple[tuple[int, ...], ...],
) -> tuple[float, float]:
    """Of the heaviest rank; of the heaviest stage."""
    sums, start = [], 0
    for count in counts:
        sums.append(sum(weights[start : start + count]))
        start += count
    sums[-1] += tail
    return round(max(sum(sums[i] for i in held) for held in ranks), 3), round(max(sums), 3)


@cache
def even_split(weights: tuple[float, ...], tail: float, count: int) -> tuple[int, ...]:
    """How many of `weights`, in order, each of `count` parts gets so that the heaviest part is as light as possible.

    `tail` lies on the last part too, so that it may get nothing else.

    >>> even_split((1.0,) * 7, 2.0, 3)
    (3, 3, 1)
    """
    low, high = max([tail, *weights]), sum(weights) + tail
    for _ in range(100):
        middle = (low + high) / 2
        if _fill(weights, tail, count, middle) is None:
            low = middle
        else:
            high = middle
    found = _fill(weights, tail, count, high * (1 + 1e-9))
    assert found is not None
    return found


def _fill(
    weights: tuple[float, ...], tail: float, count: int, limit: float
) -> tuple[int, ...] | None:
    """Parts of at most `limit`, filled from the front and then evened out; None if there are too few."""
    if tail > limit:
        return None
    counts, left = [], list(weights)
    for number in range(count):
        room, taken = limit - (tail if number == count - 1 else 0), 0
        # every part after this one but the last needs a layer of its own
        spare = len(left) - max(0, count - 2 - number)
        while taken < len(left) and taken < spare and left[taken] <= room + 1e-9 * limit:
            room -= left[taken]
            taken += 1
        counts.append(taken)
        left = left[taken:]
    return None if left else tuple(counts)
