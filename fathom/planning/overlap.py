"""How much all-to-all a pair of chunks hides: one micro-batch's forward run into another's backward (report Figure 4).

Of each layer's ten tasks six compute and four transfer; computation has one stream, transfers another, and both take
them in the order of the published traces: combine of the backward, attention forward, MLP backward, dispatch forward,
dispatch of the backward, MLP weight gradients, MLP forward, attention backward, its weight gradients, combine forward.
A task starts when its stream is free and what it needs is there; the pattern repeats layer by layer, and its steady
state is the time of a layer.
"""

from __future__ import annotations

from fathom.planning.block_time import BlockTime

LAYERS = 12
"""So many layers are walked through; the second half of them counts as the steady state."""


def pair_seconds(ahead: BlockTime, behind: BlockTime) -> float:
    """Time of one layer of a pair: `ahead` goes forward, `behind` backward (on as many SMs as are left)."""
    ends = [0.0]
    moment = Moments()
    for _ in range(LAYERS):
        moment.layer(ahead, behind)
        ends.append(max(moment.computing, moment.sending))
    half = LAYERS // 2
    return (ends[-1] - ends[half]) / (LAYERS - half)


class Moments:
    """When each stream is free, and when what the next layer needs is there."""

    def __init__(self) -> None:
        self.computing = self.sending = 0.0
        self.combined = self.attention_backward = 0.0

    def compute(self, seconds: float, needs: float) -> float:
        """Run on the computing stream; its end."""
        self.computing = max(self.computing, needs) + seconds
        return self.computing

    def send(self, seconds: float, needs: float) -> float:
        """Run on the sending stream; its end."""
        self.sending = max(self.sending, needs) + seconds
        return self.sending

    def layer(self, ahead: BlockTime, behind: BlockTime) -> None:
        """One layer of the pair, in the order of the traces."""
        gradients = self.send(behind.dispatch, self.attention_backward)
        attended = self.compute(ahead.attention.forward, self.combined)
        experts_backward = self.compute(behind.mlp.inputs, gradients)
        dispatched = self.send(ahead.dispatch, attended)
        returned = self.send(behind.combine, experts_backward)
        self.compute(behind.mlp.weights, experts_backward)
        experts = self.compute(ahead.mlp.forward, dispatched)
        self.attention_backward = self.compute(behind.attention.inputs, returned)
        self.compute(behind.attention.weights, self.attention_backward)
        self.combined = self.send(ahead.combine, experts)
