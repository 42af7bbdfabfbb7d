"""ZBV: two stages a rank in a V and the backward split everywhere (Qi et al. 2024, section 6, after ZB1P).

Rank r of R holds stage r on the way down and stage 2R - 1 - r on the way up. The last stage lies on rank 0, where the
first one is too, so that the first backward begins early and the memory is the same on all ranks. With
F = I = W, no time for transfers and at least 2R - 1 micro-batches, no rank waits between its first action and its
last. Rank r begins r forwards after the first one and ends R - 1 - r actions before the last one: a bubble of (R - 1)F.
"""

from __future__ import annotations

from fathom.parallel.schedules.actions import Action, Part, Schedule, Step


def v_placement(ranks: int) -> tuple[tuple[Part, ...], ...]:
    """Rank r holds stages r and 2R - 1 - r."""
    return tuple((Part(rank), Part(2 * ranks - 1 - rank)) for rank in range(ranks))


def zbv(stages: int, microbatches: int) -> Schedule:
    """ZBV. With fewer than `stages` - 1 micro-batches, those of the full schedule that do not exist are left out."""
    ranks = stages // 2
    steps = tuple(tuple(_steps(rank, ranks, microbatches)) for rank in range(ranks))
    return Schedule("ZBV", stages, microbatches, v_placement(ranks), steps)


def _steps(rank: int, ranks: int, microbatches: int) -> list[Step]:
    full = max(microbatches, 2 * ranks - 1)
    behind = ranks - rank
    rounds = full - 2 * ranks + rank + 1
    # "F0" is a forward of the stage on the way down, "F1" of the one on the way up
    order = ["F0"] * (2 * behind - 1)
    order += ["F1", "F0"] * rank
    order += ["F1", "I1", "W1"] * behind
    order += ["F0", "I0", "W0", "F1", "I1", "W1"] * rounds
    order += ["I0", "W0", "F1", "I1", "W1"] * (behind - 1)
    order += ["I0", "I1"] * rank
    order += ["I0", "W0"] * behind
    order += ["W1"] * rank + ["W0"] * rank
    return [step for step in _numbered(order, rank, ranks) if step.microbatch < microbatches]


def _numbered(order: list[str], rank: int, ranks: int) -> list[Action]:
    """Each kind of action takes the micro-batches in their order."""
    stage = {"0": rank, "1": 2 * ranks - 1 - rank}
    counts = dict.fromkeys(order, 0)
    actions = []
    for name in order:
        actions.append(Action(name[0], stage[name[1]], counts[name]))  # type: ignore[arg-type]
        counts[name] += 1
    return actions
