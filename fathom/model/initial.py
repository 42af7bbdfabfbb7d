"""Initial weights of a part of a model, bit for bit those of the whole one (report §4.2).

`Transformer(config)` draws its matrices one after the other from torch's CPU generator. Who keeps a part has to have
the same numbers, and has neither the memory for the whole nor the time to draw it: 671 billion numbers take some forty
minutes. So numbers are drawn where they are wanted, and what lies between is passed over (`fathom.model.mersenne`).

torch draws a tensor of n >= 16 float32 numbers from n words of its generator, in blocks of 16 that do not depend on
each other. Where n is no multiple of 16, the last 16 numbers are made anew from 16 further words. So a run of a tensor
is drawn from the words of its own blocks. Fewer than 16 numbers go another way, and are always drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.model.config import ModelConfig
from fathom.model.mersenne import pass_over
from fathom.model.transformer import Transformer

BLOCK = 16
"""Numbers that torch makes together."""
PIECE = 1 << 22
"""Numbers drawn at a time, 16 MiB: what is needed besides the place where they stay."""


@dataclass(frozen=True, eq=False)
class Run:
    """A run of one parameter's numbers."""

    tensor: Tensor
    """Where they stay, on any device."""
    offset: int = 0
    """Where they begin in the flattened parameter."""


def outline(config: ModelConfig) -> Transformer:
    """A whole model without memory, on the `meta` device."""
    with torch.device("meta"):
        return Transformer(config)


@torch.no_grad()
def draw_runs(config: ModelConfig, runs: Mapping[str, Run]) -> None:
    """Fill runs of parameters, by their names, with what `Transformer(config)` has there.

    Drawn from torch's CPU generator, which is then where it is after a whole model.
    """
    whole = {name: parameter.shape for name, parameter in outline(config).named_parameters()}
    normals = Normals(config.initializer_range)
    normals.draw(whole["model.embed_tokens.weight"].numel())  # nn.Embedding's own, which are lost
    for name, shape in whole.items():
        if len(shape) > 1:
            normals.draw(shape.numel(), runs.get(name))
        elif name in runs:
            runs[name].tensor.fill_(1.0)
    normals.finish()


class Normals:
    """Normal numbers as `Tensor.normal_` draws them for one float32 tensor after the other on a CPU."""

    def __init__(self, deviation: float, generator: torch.Generator | None = None) -> None:
        """`generator`: a CPU's, by default torch's own."""
        self.deviation = deviation
        self.generator = generator or torch.default_generator
        self._to_pass_over = 0

    def draw(self, count: int, run: Run | None = None) -> None:
        """A tensor of `count` numbers, of which a run is kept."""
        if count < BLOCK:
            self._keep(self._next(count), 0, run)
            return
        rest = BLOCK if count % BLOCK else 0
        self._draw_blocks(count, count - rest, run)
        if rest:
            self._draw_blocks(BLOCK, BLOCK, run and Run(run.tensor, run.offset - count + BLOCK))

    def finish(self) -> None:
        """Pass over what is still to be."""
        pass_over(self.generator, self._to_pass_over)
        self._to_pass_over = 0

    def _draw_blocks(self, words: int, numbers: int, run: Run | None) -> None:
        """Of so many words, the numbers that the run wants of the first `numbers`."""
        done = 0
        if run:
            first, last = max(run.offset, 0), min(run.offset + run.tensor.numel(), numbers)
            for begin in range(first - first % BLOCK, last, PIECE):
                end = min(begin + PIECE, last + -last % BLOCK)
                self._to_pass_over += begin - done
                self._keep(self._next(end - begin)[: last - begin], begin, run)
                done = end
        self._to_pass_over += words - done

    def _next(self, count: int) -> Tensor:
        self.finish()
        numbers = torch.empty(count, dtype=torch.float32, device="cpu")
        return numbers.normal_(0.0, self.deviation, generator=self.generator)

    def _keep(self, numbers: Tensor, begin: int, run: Run | None) -> None:
        """What of the numbers from `begin` on lies in the run."""
        if run:
            flat = run.tensor.view(-1)
            first = max(begin, run.offset)
            last = min(begin + len(numbers), run.offset + len(flat))
            if first < last:
                place = slice(first - run.offset, last - run.offset)
                flat[place].copy_(numbers[first - begin : last - begin])
