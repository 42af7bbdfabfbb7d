"""Whether drafting pays: tokens per second with drafts and without, as the clock says."""

from __future__ import annotations

from dataclasses import dataclass

TRIALS = 4
"""Passes by which either way is first measured."""
AGAIN, SELDOM = 64, 4096
"""After so many passes the way that was slower is measured again; twice as many each time that it still is."""
HOPELESS = 0.9
"""Share of the plain speed below which prompts are no longer followed."""
_FORGETTING = 0.8


@dataclass
class _Rate:
    """Seconds and tokens of the last passes, older ones counting less."""

    seconds: float = 0.0
    tokens: float = 0.0
    passes: int = 0

    def add(self, seconds: float, tokens: int) -> None:
        self.seconds = self.seconds * _FORGETTING + seconds
        self.tokens = self.tokens * _FORGETTING + tokens
        self.passes += 1

    @property
    def per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Payoff:
    """Whether drafting is worth its time, by batch size, from tokens per second with and without.

    Checking a draft costs little where weights are read for few rows, and nearly as much as a token
    where each row brings experts of its own; only the clock knows. Answers do not depend on it.
    """

    def __init__(self) -> None:
        self._rates: dict[tuple[int, bool], _Rate] = {}
        self._since: dict[int, int] = {}
        self._tried: dict[int, int] = {}
        self._wait: dict[int, int] = {}

    def drafting(self, requests: int) -> bool:
        """Whether the next pass for so many requests should make drafts."""
        size = requests.bit_length()
        for way in (True, False):
            if self._rate(size, way).passes < TRIALS:
                return way
        return self._better(size) != (self._since.get(size, 0) >= self._wait.get(size, AGAIN))

    def hopeless(self, requests: int) -> bool:
        """Whether drafts were slower by so much that following prompts for them is not worth its time either."""
        drafted, plain = (self._rate(requests.bit_length(), way) for way in (True, False))
        known = min(drafted.passes, plain.passes) >= TRIALS
        return known and drafted.per_second < HOPELESS * plain.per_second

    def record(self, requests: int, drafting: bool, seconds: float, tokens: int) -> None:
        """A pass that only decoded, and either checked drafts and made new ones or did neither."""
        size = requests.bit_length()
        better = self._better(size)
        self._rate(size, drafting).add(seconds, tokens)
        if self._better(size) != better:
            self._since[size] = self._tried[size] = 0
            self._wait[size] = AGAIN
            return
        if drafting == better:
            self._since[size] = self._since.get(size, 0) + 1
            return
        self._tried[size] = self._tried.get(size, 0) + 1
        if self._tried[size] >= TRIALS:
            self._since[size] = self._tried[size] = 0
            self._wait[size] = min(2 * self._wait.get(size, AGAIN), SELDOM)

    def _better(self, size: int) -> bool:
        return self._rate(size, True).per_second >= self._rate(size, False).per_second

    def _rate(self, size: int, drafting: bool) -> _Rate:
        return self._rates.setdefault((size, drafting), _Rate())
