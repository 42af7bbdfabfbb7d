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
from tests.inference.test_engine import SHAPES, model_of, random_wish, says, small_engine
from tests.inference.traffic import Expected, Traffic

SHARED = [random.Random(0).randrange(2, 101) for _ in range(20)]


@cache
def model(shape: str) -> fathom.Transformer:
    return model_of(shape)


class Served(RuleBasedStateMachine):
    """An engine of random size with requests at random times."""

    @initialize(
        shape=st.sampled_from(sorted(SHAPES)),
        tokens=st.sampled_from((64, 100, 1000)),
        block_size=st.sampled_from((1, 4, 7, 16)),
        batch_tokens=st.sampled_from((5, 24, 200)),
        max_requests=st.integers(1, 6),
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
            min(tokens, 128 * max_requests),  # no more than could ever be used
            block_size=block_size,
            batch_tokens=batch_tokens,
            max_requests=max_requests,
            speculate=drafts if self.model.config.num_nextn_predict_layers else 0,
            prefix_cache=prefix_cache,
        )
        self.traffic = Traffic(engine, random.Random(drafts))

    @rule(begin=st.sampled_from((0, 8, 17, 20)), own=st.integers(1, 20), seed=st.integers(0, 999))
    def come(self, begin: int, own: int, seed: int) -> None:
        rng = random.Random(seed)
        prompt = SHARED[:begin] + [rng.randrange(2, 101) for _ in range(own)]
        wish = replace(random_wish(rng), max_new_tokens=rng.randint(1, 12))
        tokens, gap = says(self.model, prompt, wish, {self.model.config.eos_token_id})
        self.traffic.come(prompt, wish, Expected(tokens, [gap] * len(tokens)))

    @rule(count=st.integers(1, 6))
    def go_on(self, count: int) -> None:
        for _ in range(count):
            self.traffic.step()

    @precondition(lambda self: self.traffic.running())
    @rule(data=st.data())
    def go_away(self, data: st.DataObject) -> None:
        running = self.traffic.running()
        self.traffic.abort(running[data.draw(st.integers(0, len(running) - 1))])

    def teardown(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.finish()
            assert self.traffic.verdicts()["different"] == 0


TestServed = Served.TestCase
TestServed.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, derandomize=True
)
