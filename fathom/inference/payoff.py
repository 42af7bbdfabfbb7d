"""Whether drafting pays: tokens per second with drafts and without, as the clock says.

Checking a draft costs little where weights are read for few rows, and nearly as much as a token
where each row brings experts of its own; only the clock knows. Asking it costs time too, since the
slower way must be gone now and then. So there is a ledger: `spent`, seconds of all passes, and
`lost`, seconds that drafts took beyond what their tokens would have taken without them. Drafts are
tried only while what they lost is within `BUDGET` of what was spent, and ever more seldom.
"""

from __future__ import annotations

from dataclasses import dataclass

TRIALS = 8
"""Passes by which either way is measured. The first drafts of an answer that modules have not followed are poor."""
AGAIN, SELDOM = 64, 4096
"""After so many passes the way that was slower is measured again; twice as many each time that it still is."""
BUDGET = 0.01
"""Share of all time that trials of drafts may lose; a new trial waits until half of it is left."""
_FORGETTING = 0.8
_REMEMBERED = 4096
"""Passes over which the ledger goes back."""


@dataclass
class _Rate:
    """Seconds and tokens of the last passes, older ones counting less."""

    seconds: float = 0.0
    tokens: float = 0.0
    weight: float = 0.0
    passes: int = 0

    def add(self, seconds: float, tokens: int) -> None:
        self.seconds = self.seconds * _FORGETTING + seconds
        self.tokens = self.tokens * _FORGETTING + tokens
        self.weight = self.weight * _FORGETTING + 1
        self.passes += 1

    @property
    def known(self) -> bool:
        return self.passes >= TRIALS

    @property
    def per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def seconds_per_pass(self) -> float:
        return self.seconds / self.weight if self.weight else 0.0


@dataclass
class _Turn:
    """Where one batch size stands between trials."""

    since: int = 0
    """Passes in the faster way since the last trial."""
    tried: int = 0
    """Passes of the trial that is going on."""
    wait: int = 0
    """Passes until the next one."""


class Payoff:
    """Whether the next pass should draft, by batch size. Answers do not depend on it."""

    def __init__(self, drafts: int, drafts_first: bool) -> None:
        """`drafts` behind each token; `drafts_first`: whether they are taken to pay until the clock has said."""
        self.drafts, self.drafts_first = drafts, drafts_first
        self.spent = self.lost = 0.0
        self._rates: dict[tuple[int, bool], _Rate] = {}
        self._turns: dict[int, _Turn] = {}

    def drafting(self, requests: int, alone: bool = True) -> bool:
        """Whether the next pass for so many requests should make drafts; `alone`: no prompts in this one."""
        size = requests.bit_length()
        better = self._better(size)
        if not alone or not self._rate(size, better).known:
            return better
        turn = self._turn(size)
        due = turn.tried > 0 or turn.since >= turn.wait
        return better != (due and (better or self._affordable(size)))

    def following(self, requests: int) -> bool:
        """Whether modules should read prompts, so that drafts behind them are good ones."""
        size = requests.bit_length()
        unknown = not (self._rate(size, True).known and self._rate(size, False).known)
        return self._better(size) and (unknown or self.lost <= BUDGET * self.spent)

    def record(self, requests: int, drafting: bool, seconds: float, tokens: int) -> None:
        """A pass that only decoded, and either checked drafts and made new ones or did neither."""
        size = requests.bit_length()
        plain = self._rate(size, False).per_second
        self.spend(seconds, seconds - tokens / plain if drafting and plain else 0.0)
        better = self._better(size)
        self._rate(size, drafting).add(seconds, tokens)
        turn = self._turn(size)
        if self._better(size) != better:
            self._turns[size] = _Turn(wait=AGAIN)
        elif drafting == better:
            turn.since += 1
        else:
            turn.tried += 1
            if turn.tried >= TRIALS:
                self._turns[size] = _Turn(wait=min(2 * max(turn.wait, AGAIN // 2), SELDOM))

    def spend(self, seconds: float, on_drafts: float) -> None:
        """Any pass, and how much of it would not have been without drafts."""
        keep = 1 - 1 / _REMEMBERED
        self.spent = self.spent * keep + seconds
        self.lost = self.lost * keep + on_drafts

    def _affordable(self, size: int) -> bool:
        """Whether the ledger has room for another pass with drafts, though they are not known to pay."""
        plain, drafted = self._rate(size, False), self._rate(size, True)
        share = BUDGET if self._turn(size).tried else BUDGET / 2
        loss = (
            self.drafts * plain.seconds_per_pass
        )  # as if every draft took a pass and none were right
        if drafted.passes:
            slower = 1 - drafted.per_second / plain.per_second
            loss = drafted.seconds_per_pass * max(slower, 0.0)
        return self.lost + loss <= share * self.spent

    def _better(self, size: int) -> bool:
        drafted, plain = self._rate(size, True), self._rate(size, False)
        if not (drafted.known and plain.known):
            return self.drafts_first
        return drafted.per_second >= plain.per_second

    def _rate(self, size: int, drafting: bool) -> _Rate:
        return self._rates.setdefault((size, drafting), _Rate())

    def _turn(self, size: int) -> _Turn:
        return self._turns.setdefault(size, _Turn())
