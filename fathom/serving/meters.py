"""What Prometheus reads at /metrics; names have the shape of vLLM's, with `fathom:` before them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fathom.inference import Delta, Ended, Engine, Request

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


@dataclass
class _Seen:
    """A request's times, and what has been counted of it."""

    arrived: float
    last_token: float | None = None
    drafts: tuple[int, int, int] = (0, 0, 0)
    accepted: tuple[int, ...] = ()


class Meters:
    """All metrics of one server, in a registry of their own; its methods are for the engine's thread."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self._seen: dict[Request, _Seen] = {}
        self._gauges(engine)
        self._totals(engine.speculate)
        self._histograms()
        for (
            reason
        ) in Ended:  # a rate over a series that appears with its first count would miss that one
            self.success.labels(str(reason))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def counted_http(self, path: str, status: int) -> None:
        """A request that was answered, by its route and status; from the event loop."""
        self.http.labels(path, str(status)).inc()

    def arrived(self, request: Request) -> None:
        """A request that was accepted."""
        self._seen[request] = _Seen(time.monotonic())

    def stepped(self, deltas: Sequence[Delta]) -> None:
        """What a step added."""
        now = time.monotonic()
        for delta in deltas:
            seen = self._seen[delta.request]
            self.generation_tokens.inc(len(delta.token_ids))
            self._time(seen, now, len(delta.token_ids))
            self._count_drafts(delta.request, seen)
            if delta.ended:
                self.left(delta.request)

    def left(self, request: Request) -> None:
        """A request that has ended or was aborted."""
        seen, usage = self._seen.pop(request), request.usage
        self.success.labels(str(request.ended)).inc()
        self.e2e.observe(time.monotonic() - seen.arrived)
        self.prompt_tokens.inc(usage.prompt_tokens)
        self.prefix_queries.inc(usage.prompt_tokens)
        self.prefix_hits.inc(usage.cached_tokens)
        self.preemptions.inc(usage.preemptions)
        self.request_prompt_tokens.observe(usage.prompt_tokens)
        self.request_generation_tokens.observe(usage.completion_tokens)

    def _time(self, seen: _Seen, now: float, tokens: int) -> None:
        """Several tokens of one step share its time."""
        if seen.last_token is None:
            self.ttft.observe(now - seen.arrived)
            tokens -= 1
            seen.last_token = now
        for _ in range(tokens):
            self.inter_token.observe((now - seen.last_token) / tokens)
        seen.last_token = now

    def _count_drafts(self, request: Request, seen: _Seen) -> None:
        """What came to the request's counts of drafts since the last step."""
        drafted, accepted = request.usage.drafted, tuple(request.usage.accepted)
        now = (drafted[0] if drafted else 0, sum(drafted), sum(accepted))
        for meter, new, old in zip(self.drafts, now, seen.drafts, strict=True):
            meter.inc(new - old)
        before = seen.accepted + (0,) * (len(accepted) - len(seen.accepted))
        for place, (new, old) in enumerate(zip(accepted, before, strict=True)):
            self.accepted_per_position.labels(str(place)).inc(new - old)
        seen.drafts, seen.accepted = now, accepted

    def _gauges(self, engine: Engine) -> None:
        scheduler, pool = engine.scheduler, engine.pool
        for name, what, value in (
            (
                "num_requests_running",
                "Answers that the engine works on.",
                lambda: len(scheduler.running),
            ),
            (
                "num_requests_waiting",
                "Answers that wait for a place.",
                lambda: len(scheduler.waiting),
            ),
            (
                "kv_cache_usage_perc",
                "Share of the cache's blocks in use, 1 is all.",
                lambda: 1 - pool.free / pool.count,
            ),
            ("num_kv_cache_blocks", "Blocks of the cache.", lambda: pool.count),
        ):
            Gauge(f"fathom:{name}", what, registry=self.registry).set_function(value)

    def _totals(self, drafts: int) -> None:
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended requests.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens that were generated.")
        self.prefix_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self.prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found there.")
        self.preemptions = self._counter(
            "num_preemptions", "Requests whose blocks were taken away for a while."
        )
        self.success = self._counter(
            "request_success", "Ended requests, by reason.", "finished_reason"
        )
        self.http = self._counter(
            "http_requests", "HTTP requests, by route and status.", "handler", "status"
        )
        self.drafts = (
            self._counter("spec_decode_num_drafts", "Passes that checked drafts."),
            self._counter("spec_decode_num_draft_tokens", "Drafts that were checked."),
            self._counter("spec_decode_num_accepted_tokens", "Drafts that were right."),
        )
        self.accepted_per_position = self._counter(
            "spec_decode_num_accepted_tokens_per_pos",
            "Drafts that were right, by place.",
            "position",
        )

    def _histograms(self) -> None:
        self.ttft = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token."
        )
        self.inter_token = self._histogram("inter_token_latency_seconds", "Between two tokens.")
        self.e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the end.")
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens.", _TOKENS
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens.", _TOKENS
        )

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"fathom:{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        return Histogram(f"fathom:{name}", what, registry=self.registry, buckets=buckets)
