"""How much all-to-all a pair of chunks hides: one micro-batch's forward run into another's backward (report Figure 4).

The ten operations of a layer, their published order and what each waits for are data in `fathom.parallel.schedules`;
here they get the times of a block. The pattern repeats layer by layer, and its steady state is the time of a layer.
"""

from __future__ import annotations

from functools import cache

from fathom.parallel.schedules import OVERLAPPED_ORDER, overlapped_time
from fathom.parallel.schedules.overlap import Operation
from fathom.planning.block_time import BlockTime

LAYERS = 12
"""So many layers are walked through; the second half of them counts as the steady state."""


@cache
def pair_seconds(ahead: BlockTime, behind: BlockTime) -> float:
    """Time of one layer of a pair: `ahead` goes forward, `behind` backward (on as many SMs as are left)."""
    times, half = _times(ahead, behind), LAYERS // 2
    begun, ended = (overlapped_time(OVERLAPPED_ORDER, times, n).total for n in (half, LAYERS))
    return (ended - begun) / (LAYERS - half)


def _times(ahead: BlockTime, behind: BlockTime) -> dict[Operation, float]:
    """Seconds by operation. The backward of combine takes gradients where dispatch takes tokens, and so as long."""
    return {
        ("F", "attention"): ahead.attention.forward,
        ("F", "dispatch"): ahead.dispatch,
        ("F", "mlp"): ahead.mlp.forward,
        ("F", "combine"): ahead.combine,
        ("B", "combine"): behind.dispatch,
        ("B", "mlp"): behind.mlp.inputs,
        ("W", "mlp"): behind.mlp.weights,
        ("B", "dispatch"): behind.combine,
        ("B", "attention"): behind.attention.inputs,
        ("W", "attention"): behind.attention.weights,
    }
