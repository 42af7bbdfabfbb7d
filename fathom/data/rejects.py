"""What a corpus holds that cannot be used: counted, quoted, never fatal, never silent."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

_EXAMPLES = 5
QUOTED = 200
"""Characters of a reject that are kept to recognise it by."""


@dataclass(frozen=True)
class Reject:
    """One record or file that gives no document, and the beginning of what stood there."""

    reason: str
    quote: str = ""


@dataclass
class Rejects:
    """How many for which reason, with the first few places."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str, place: str, quote: str = "") -> None:
        """Count one reject; `quote` is the beginning of what was found there."""
        self.counts[reason] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{place}: {reason}" + (f": {quote[:60]!r}" if quote else ""))

    @property
    def total(self) -> int:
        """Files and records rejected."""
        return self.counts.total()

    def summary(self) -> str:
        """One line: "3 rejected (2 not UTF-8 text, 1 broken JSON), e.g. a.bin: not UTF-8 text"."""
        if not self.total:
            return "nothing rejected"
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.counts.most_common())
        return f"{self.total} rejected ({reasons}), e.g. {self.examples[0]}"


@dataclass
class ListedRejects(Rejects):
    """Every one of them, not the first few alone."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    """(reason, place)."""

    def add(self, reason: str, place: str, quote: str = "") -> None:
        """Count and list one reject."""
        super().add(reason, place, quote)
        self.lines.append((reason, place))
