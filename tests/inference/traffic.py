"""Requests that come and go at any time, and what each of them must have said in the end.

Driven by the stateful test and by `benchmarks/engine_property.py`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fathom.inference import Ended, Engine, Request, Sampling
from fathom.inference.blocks import NOBODY
from fathom.inference.choice import CLOSE


@dataclass(frozen=True)
class Expected:
    """What the reference says, and how far each of its choices was from another one."""

    tokens: list[int]
    gaps: Sequence[float]


def verdict(said: list[int], expected: Expected, whole: bool) -> str:
    """ "equal"; "close" where the first difference was a choice closer than `CLOSE`; otherwise "different".

    An answer that was broken off (`whole` false) need only be a beginning.
    """
    pairs = zip(said, expected.tokens, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if place is None:
        length, full = len(said), len(expected.tokens)
        return "equal" if length == full or (length < full and not whole) else "different"
    return "close" if expected.gaps[place] < CLOSE else "different"


class Traffic:
    """One engine, the requests it was given, and what is known of their answers."""

    def __init__(self, engine: Engine, rng: random.Random, guessing: float = 0.7) -> None:
        """`guessing`: how often drafts are replaced by what is right, so that many are accepted."""
        self.engine = engine
        self.asked: list[tuple[Request, Expected]] = []
        self._answers: dict[Request, list[int]] = {}
        if engine.drafter is not None:
            engine.drafter.follow = self._guesses(engine.drafter.follow, rng, guessing)  # type: ignore[method-assign]

    def _guesses(self, follow: Any, rng: random.Random, guessing: float) -> Any:
        """Random modules guess nothing right; this lets some drafts be right, up to some place."""

        def better(fresh: Any, drafting: set[Request]) -> None:
            follow(fresh, drafting)
            for request in drafting:
                if rng.random() < guessing:
                    place = len(request.ids) - request.prompt_len
                    right = self._answers[request][place : place + len(request.drafts)]
                    right = right[: rng.randint(0, len(right))]
                    request.drafts[: len(right)] = right

        return better

    def come(self, prompt: list[int], wish: Sampling, expected: Expected) -> None:
        """A request arrives."""
        (request,) = self.engine.add(prompt, wish)
        self.asked.append((request, expected))
        self._answers[request] = expected.tokens

    def step(self) -> None:
        """One pass, if there is anything to do, and a look at the accounts."""
        if self.engine.busy:
            self.engine.step()
        self.check_accounts()

    def running(self) -> list[Request]:
        return [request for request, _ in self.asked if request.ended is None]

    def push_out(self) -> None:
        """Take the blocks of the youngest that runs, as want of memory would."""
        if self.engine.scheduler.running:
            self.engine.scheduler.preempt(self.engine.scheduler.running[-1])
            self.check_accounts()

    def abort(self, request: Request) -> None:
        self.engine.abort(request)
        self.check_accounts()

    def finish(self) -> None:
        """Go on until nothing is left; ten passes for each token must do, even if each pass reads one."""
        for _ in range(10 * sum(request.limit for request, _ in self.asked)):
            if not self.engine.busy:
                break
            self.step()
        assert not self.running(), "requests that never end"
        self.nothing_is_left()

    def check_accounts(self) -> None:
        """Each block is held by as many texts as the pool believes, and texts hold the blocks they have read."""
        pool, scheduler = self.engine.pool, self.engine.scheduler
        holders = np.zeros(pool.count, int)
        for request in scheduler.running:
            np.add.at(holders, request.blocks, 1)
            assert request.ended is None
            assert request.computed <= len(request.blocks) * pool.size
        assert (holders == pool._holders).all()
        assert pool.free == int((holders == 0).sum())
        assert not any(request.blocks for request in scheduler.waiting)

    def nothing_is_left(self) -> None:
        engine = self.engine
        assert engine.pool.free == engine.pool.count
        assert (engine.pool._holders == 0).all() and (engine.pool._place_of == NOBODY).all()
        assert engine.drafter is None or not engine.drafter.trails

    def verdicts(self) -> Counter[str]:
        """How many answers were what they must be; every answer's own account is checked on the way."""
        found: Counter[str] = Counter()
        for request, expected in self.asked:
            whole = request.ended is not Ended.ABORT
            found[verdict(request.answer, expected, whole)] += 1
            assert request.usage.completion_tokens == len(request.answer)
            if whole:
                stopped = request.answer[-1] in request.ends
                assert request.ended is (Ended.STOP if stopped else Ended.LENGTH)
                assert stopped or len(request.ids) == request.limit
        return found

    def usage(self) -> Counter[str]:
        """What happened on the way, summed over the requests."""
        total: Counter[str] = Counter()
        for request, _ in self.asked:
            usage = request.usage
            total["aborted"] += request.ended is Ended.ABORT
            total["tokens"] += usage.completion_tokens
            total["preemptions"] += usage.preemptions
            total["cached prompt tokens"] += usage.cached_tokens
            total["drafts"] += sum(usage.drafted)
            total["right drafts"] += sum(usage.accepted)
        return total
