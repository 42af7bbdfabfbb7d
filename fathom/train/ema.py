"""Exponential moving average of the parameters, in CPU memory, beside the training (report §3.2.3).

After each step the average moves a little towards the weights, a <- a + (1 - d) (w - a), which gives an early
look at how the model will do once the rate has fallen. It is kept in float32 in CPU memory and computed by a thread of
its own while the next step's forward and backward pass run, so that it costs the device no memory and little time.

On a CPU that thread reads the live weights; the next optimiser step waits for it. From a GPU the weights are first
copied to pinned memory on a stream of their own.

The report gives neither d nor a start. Ours: the average starts as the initial weights, and update number n uses
min(d, n / (n + 9)), so that the first updates follow closely and the initial weights are soon forgotten. Router biases
are averaged too: they belong to the routers' weights of the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.errors import RecipeError
from fathom.model import Transformer
from fathom.parallel.pieces import here


@dataclass(frozen=True)
class EmaConfig:
    """Table [ema]."""

    decay: float = 0.0
    """Share of the average that an update keeps; 0 keeps no average. 0.999 suits runs of some thousand steps (our
    choice, the report gives none)."""
    every: int = 1
    """Steps between updates; each then keeps decay^every."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise RecipeError(
                f"ema.decay = {self.decay} must lie in [0, 1); 0.999 is usual, 0 is none"
            )
        if self.every < 1:
            raise RecipeError(f"ema.every = {self.every} must be at least 1; raise it")


def averaged(model: Transformer) -> dict[str, Tensor]:
    """The live tensors that an average is kept of, by name: parameters and router biases, a tied head once.

    Of parameters in shards what is here.
    """
    tensors = {name: here(tensor) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # another rank's, maybe
    return tensors


class Ema:
    """The average and the thread that moves it. `wait` before the weights change or the average is read."""

    def __init__(self, model: Transformer, config: EmaConfig) -> None:
        self.config = config
        self.updates = 0
        self.live = averaged(model)
        self._average = {
            name: t.to("cpu", torch.float32, copy=True) for name, t in self.live.items()
        }
        self._thread = ThreadPoolExecutor(1, "ema")
        self._running: Future[None] | None = None
        on_a_gpu = next(model.parameters()).is_cuda
        self._copies = _Copies(self.live) if on_a_gpu else None

    def update(self, step: int) -> None:
        """Begin to move the average towards the weights as they are now, if step `step` is one for it."""
        if step % self.config.every:
            return
        self.wait()
        self.updates += 1
        decay = min(self.config.decay**self.config.every, self.updates / (self.updates + 9))
        if self._copies:
            self._copies.begin()
        self._running = self._thread.submit(self._move, decay)

    @torch.no_grad()
    def _move(self, decay: float) -> None:
        weights = self._copies.finished() if self._copies else self.live
        for name, average in self._average.items():
            average.lerp_(weights[name].to("cpu", torch.float32), 1 - decay)

    def wait(self) -> None:
        """Return once no update is under way."""
        if self._running:
            self._running.result()
            self._running = None

    def tensors(self) -> dict[str, Tensor]:
        """The average by the model's names; the live tensors, so that a checkpoint can be read into them."""
        self.wait()
        return self._average

    @contextmanager
    @torch.no_grad()
    def in_place_of_weights(self) -> Iterator[None]:
        """Within, the model computes with the average; afterwards its weights are what they were, bit for bit."""
        average = self.tensors()
        kept = {name: t.clone() for name, t in self.live.items()}
        _copy(average, self.live)
        try:
            yield
        finally:
            _copy(kept, self.live)


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


class _Copies:
    """A GPU's weights in pinned memory, copied on a stream of their own."""

    def __init__(self, live: dict[str, Tensor]) -> None:
        self.live = live
        self.pinned = {
            name: torch.empty_like(t, device="cpu", pin_memory=True) for name, t in live.items()
        }
        self.stream = torch.cuda.Stream()
        self.copied = torch.cuda.Event()

    def begin(self) -> None:
        """Queue the copy behind what the device is doing now."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), torch.no_grad():
            for name, tensor in self.live.items():
                self.pinned[name].copy_(tensor, non_blocking=True)
            self.copied.record()

    def finished(self) -> dict[str, Tensor]:
        """The copies, once they are there."""
        self.copied.synchronize()
        return self.pinned
