"""Bubble and memory of all pipeline schedules, simulated, beside Table 2 of the report; and a picture of each.

    python benchmarks/pipeline_schedules.py [--pictures docs/images] [--json FILE]

Nothing is run on devices: a schedule is data, and the simulator adds up the costs of its actions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from fathom.parallel import (
    OVERLAPPED_ORDER,
    POSTED_EARLY,
    SCHEDULES,
    Costs,
    activations_in_table_2,
    bubble_in_table_2,
    overlapped_time,
    schedule,
    simulate,
)
from fathom.parallel.draw import draw_timeline
from fathom.parallel.schedules.formulas import IN_TABLE_2
from fathom.parallel.schedules.overlap import COMMUNICATION, ONE_AFTER_THE_OTHER

STAGES = (4, 8, 16)
COSTS = {
    "B = 2F, a pair saves nothing": Costs(pair=3.0),
    "B = 2F, a pair saves a sixth": Costs(pair=2.5),
    "B = 2F, a pair is run one after the other": Costs(),
    "I = 1.25 F, W = 0.75 F, a pair saves a sixth": Costs(1, 1.25, 0.75, pair=2.5),
    "I = 0.75 F, W = 1.25 F, a pair saves a sixth": Costs(1, 0.75, 1.25, pair=2.5),
    "B = 2F, a pair saves a sixth, a transfer takes 0.1 F": Costs(pair=2.5, transfer=0.1),
}
DRAWN_STAGES, DRAWN_MICROBATCHES, DRAWN_COSTS = 8, 20, Costs(pair=2.5)

Row = dict[str, str | int | float | None]


def rows() -> Iterator[Row]:
    for described, costs in COSTS.items():
        for stages in STAGES:
            for name in SCHEDULES:
                yield row(described, costs, stages, name)


def row(described: str, costs: Costs, stages: int, name: str) -> Row:
    """One schedule, simulated, with at least 20 micro-batches and as many as DualPipe needs at this depth."""
    found = simulate(schedule(name, stages, max(20, 2 * stages)), costs)
    listed = name in IN_TABLE_2
    return {
        "costs": described,
        "stages": stages,
        "microbatches": found.schedule.microbatches,
        "schedule": name,
        "ranks": found.schedule.ranks,
        "time": round(found.makespan, 6),
        "idle_least": round(min(found.idle), 6),
        "idle_most": round(max(found.idle), 6),
        "table_2": round(bubble_in_table_2(name, stages, costs), 6) if listed else None,
        "bubble_percent": round(100 * found.bubble_fraction, 2),
        "activations": max(found.peak_activations),
        "before_input_grad": max(found.peak_before_input_grad),
        "activations_table_2": activations_in_table_2(name, stages) if listed else None,
    }


def print_tables(found: list[Row]) -> None:
    heads = (
        "stages | schedule | ranks | time | idle per rank | Table 2 | idle, % "
        "| activations held | of these before I or B | Table 2"
    )
    for described in COSTS:
        print(f"\n{described}\n\n| {heads} |\n|{'---|' * (heads.count('|') + 1)}")
        for one in (one for one in found if one["costs"] == described):
            print(f"| {' | '.join(cells(one))} |")


def cells(one: Row) -> list[str]:
    least, most = one["idle_least"], one["idle_most"]
    idle = f"{most:g}" if least == most else f"{least:g} to {most:g}"
    bubble, held = one["table_2"], one["activations_table_2"]
    return [
        f"{one['stages']}",
        f"{one['schedule']}",
        f"{one['ranks']}",
        f"{one['time']:g}",
        idle,
        "" if bubble is None else f"{bubble:g}",
        f"{one['bubble_percent']:.1f}",
        f"{one['activations']}",
        f"{one['before_input_grad']}",
        "" if held is None else f"{held}",
    ]


def on_equal_ranks() -> Iterator[Row]:
    """The same model on the same ranks: two stages of half the size on each where the schedule is a V."""
    for ranks in STAGES:
        for name in SCHEDULES:
            parts = 2 if name in ("ZBV", "DualPipeV") else 1
            costs = Costs(1 / parts, 1 / parts, 1 / parts, pair=2.5 / parts)
            found = simulate(schedule(name, parts * ranks, max(20, 2 * ranks)), costs)
            yield {
                "ranks": ranks,
                "schedule": name,
                "time": round(found.makespan, 6),
                "bubble_percent": round(100 * found.bubble_fraction, 2),
                "activations": max(found.peak_activations) / parts,
                "copies": found.schedule.copies,
            }


def print_on_equal_ranks(found: list[Row]) -> None:
    heads = "ranks | schedule | time | idle, % | activations held | copies of the parameters"
    print(f"\nThe same model on the same ranks, B = 2F, a pair saves a sixth\n\n| {heads} |")
    print(f"|{'---|' * (heads.count('|') + 1)}")
    for one in found:
        print(
            f"| {one['ranks']} | {one['schedule']} | {one['time']:g} | {one['bubble_percent']:.1f} "
            f"| {one['activations']:g} | {one['copies']} |"
        )


def print_pairs() -> None:
    """What orders of the operations inside a pair hide of its all-to-alls, beside computations that take 1."""
    orders = {
        "as published": OVERLAPPED_ORDER,
        "each all-to-all posted at once": POSTED_EARLY,
        "one chunk after the other": ONE_AFTER_THE_OTHER,
    }
    lengths = (1.0, 1.5, 2.0)
    heads = [f"an all-to-all takes {n:g}, {who}" for n in lengths for who in ("GPU", "CPU")]
    print(f"\nCommunication hidden in a pair of four layers\n\n| order | {' | '.join(heads)} |")
    print(f"|{'---|' * (len(heads) + 1)}")
    for described, order in orders.items():
        hidden = [
            overlapped_time(
                order, {o: n if o[1] in COMMUNICATION else 1.0 for o in order}, 4, cpu
            ).hidden
            for n in lengths
            for cpu in (False, True)
        ]
        print(f"| {described} | {' | '.join(f'{share:.1%}' for share in hidden)} |")


def draw(folder: Path) -> None:
    for name in SCHEDULES:
        found = simulate(schedule(name, DRAWN_STAGES, DRAWN_MICROBATCHES), DRAWN_COSTS)
        draw_timeline(found, folder / f"schedule-{name.lower()}.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, help="folder for one picture of each schedule")
    parser.add_argument("--json", type=Path, help="file for every number")
    chosen = parser.parse_args(argv)
    found = list(rows())
    print_tables(found)
    equal = list(on_equal_ranks())
    print_on_equal_ranks(equal)
    print_pairs()
    if chosen.pictures:
        draw(chosen.pictures)
    if chosen.json:
        chosen.json.write_text(json.dumps({"stages": found, "ranks": equal}, indent=1) + "\n")


if __name__ == "__main__":
    main()
