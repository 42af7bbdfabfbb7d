"""The hardware that the report asks for (§3.5), as what-ifs: the same layout with one thing changed in the rates.

Only what the planner reckons can change: SMs that communication takes, and passes of casts through memory. The report's
wish for more accumulation bits (§3.5.2) changes exactness, not time, so it has no row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fathom.model import ModelConfig
from fathom.planning.cluster import Device
from fathom.planning.layout import PlannedLayout
from fathom.planning.rates import Rates
from fathom.planning.step_time import StepTime, step_time


@dataclass(frozen=True)
class WhatIf:
    """A change of the hardware or the software below us."""

    name: str
    """As `--what-if` takes it."""
    says: str
    """What changes, with its place in the report."""
    needs_fp8: bool = False
    """Whether it changes nothing without FP8."""

    def rates(self, rates: Rates) -> Rates:
        """The changed rates."""
        one_scale = max(rates.fp8, rates.fp8_one_scale)
        changes: dict[str, dict[str, object]] = {
            "offload": {"communication_sms": 0},
            "few-sms": {"communication_sms": min(6, rates.communication_sms)},
            "tile-scaling": {"fp8": one_scale},
            "fused-cast": {"cast": False},
            "transposed-reads": {"transpose": False},
        }
        chosen = changes.get(self.name)
        if chosen is None:  # "all"
            chosen = {key: value for change in changes.values() for key, value in change.items()}
            chosen["communication_sms"] = 0
        return replace(rates, **chosen)  # type: ignore[arg-type]


WHAT_IFS = {
    one.name: one
    for one in (
        WhatIf("offload", "§3.5.1: communication off the SMs, 20 of 132 back"),
        WhatIf("few-sms", "DeepEP's second version: 6 SMs move the tokens instead of 20"),
        WhatIf("tile-scaling", "§3.5.2: tile and block scales applied in the tensor core", True),
        WhatIf("fused-cast", "§3.5.2: FP8 casts on the way, no pass of their own", True),
        WhatIf("transposed-reads", "§3.5.2: transposed reads, no second cast for backward", True),
        WhatIf("all", "all of §3.5 that changes time"),
    )
}


@dataclass(frozen=True)
class Outcome:
    """What a what-if would give."""

    what_if: WhatIf
    step: StepTime
    gain: float
    """Tokens per second more, as a share of what there is without it."""


def outcomes(
    config: ModelConfig,
    layout: PlannedLayout,
    device: Device,
    rates: Rates,
    *,
    seq_len: int,
    batch: int,
    mtp: bool = True,
) -> list[Outcome]:
    """Every what-if that can change something in this layout, beyond what `rates` have already."""
    names = [
        n for n, one in WHAT_IFS.items() if _concerns(one, layout) and one.rates(rates) != rates
    ]

    def step(changed: Rates) -> StepTime:
        return step_time(config, layout, device, changed, seq_len=seq_len, batch=batch, mtp=mtp)

    base = step(rates).tokens_per_second
    found = []
    for name in names:
        changed = step(WHAT_IFS[name].rates(rates))
        found.append(Outcome(WHAT_IFS[name], changed, changed.tokens_per_second / base - 1))
    return found


def _concerns(one: WhatIf, layout: PlannedLayout) -> bool:
    shares_sms = layout.overlap and layout.ep > 1
    if one.name == "all":
        return shares_sms or layout.fp8
    return layout.fp8 if one.needs_fp8 else shares_sms
