"""The engine under random traffic: requests come, share beginnings, push each other out, and go away.

Whatever happens, each answer is the naive loop's, up to the exactness rule, and no block is lost.
`benchmarks/engine_property.py` does the same with many thousand requests against `transformers`.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import fathom
from tests.inference.engines import SHAPES, model_of, random_wish, says, small_engine
from tests.inference.traffic import Expected, Traffic

SHARED = [*range(40, 57)]


@cache
def model(shape: str) -> fathom.Transformer:
    return model_of(shape)


class Served(RuleBasedStateMachine):
    """An engine of random size with requests at random times."""

    @initialize(
        shape=st.sampled_from(sorted(SHAPES)),
        tokens=st.sampled_from((40, 44, 200)),
        block_size=st.sampled_from((1, 2, 4, 16)),
        batch_tokens=st.sampled_from((5, 24, 200)),
        max_requests=st.sampled_from((2, 4, 8)),
        drafts=st.integers(0, 4),
        prefix_cache=st.booleans(),
    )
    def start(
        self,
        shape: str,
        tokens: int,
        block_size: int,
        batch_tokens: int,
        max_requests: int,
        drafts: int,
        prefix_cache: bool,
    ) -> None:
        self.model = model(shape)
        engine = small_engine(
            self.model,
            tokens,
            block_size=block_size,
            batch_tokens=batch_tokens,
            max_requests=max_requests,
            speculate=drafts if self.model.config.num_nextn_predict_layers else 0,
            prefix_cache=prefix_cache,
        )
        self.traffic = Traffic(engine, random.Random(drafts))

    @rule(
        begin=st.sampled_from((0, 8, 17)),
        seeds=st.lists(st.integers(0, 999), min_size=1, max_size=4),
    )
    def come(self, begin: int, seeds: list[int]) -> None:
        for rng in map(random.Random, seeds):
            front = [
                rng.randrange(2, 101) for _ in range(rng.choice((0, 0, 4)))
            ]  # alike only inside
            rest = [rng.randrange(2, 101) for _ in range(rng.randint(1, 5))]
            prompt = front + SHARED[:begin] + rest
            wish = replace(random_wish(rng), max_new_tokens=rng.choice((1, 7, 14)))
            tokens, gap = says(self.model, prompt, wish, {self.model.config.eos_token_id})
            self.traffic.come(prompt, wish, Expected(tokens, [gap] * len(tokens)))

    @rule(count=st.integers(1, 6))
    def go_on(self, count: int) -> None:
        for _ in range(count):
            self.traffic.step()

    @precondition(lambda self: len(self.traffic.running()) > 2)
    @rule(which=st.integers(0, 9))
    def go_away(self, which: int) -> None:
        running = self.traffic.running()
        self.traffic.abort(running[which % len(running)])

    @precondition(lambda self: self.traffic.engine.scheduler.running)
    @rule()
    def push_out(self) -> None:
        self.traffic.push_out()

    def teardown(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.finish()
            assert self.traffic.verdicts()["different"] == 0


TestServed = Served.TestCase
TestServed.settings = settings(
    max_examples=20, stateful_step_count=15, deadline=None, derandomize=True
)
