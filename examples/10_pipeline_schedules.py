"""Lesson 10 — pipeline schedules (report §3.2.1, Table 2): who computes when, and who waits.

A schedule is data: for each rank a list of actions. F is a forward pass of one micro-batch through a
stage; the backward pass is I, the gradient of its input, which the stage before waits for, and W, the
gradients of its weights, for which nobody waits and which therefore can fill holes.
"""

from fathom.parallel import Costs, bubble_in_table_2, schedule, simulate

RANKS, MICRO_BATCHES = 8, 20
costs = Costs(
    forward=1.0, input_grad=1.0, weight_grad=1.0, pair=2.4
)  # F&B together: less than 1 + 2

# 1. 1F1B keeps a backward pass whole. A rank deep in the pipeline waits for its first micro-batch, the first rank for
#    the last gradient.
plain = schedule("1F1B", RANKS, MICRO_BATCHES)
print("last rank of 1F1B:", *(f"{a.kind}{a.microbatch}" for a in plain.steps[-1][:6]), "…")

# 2. Idle time of a rank and micro-batches that it keeps activations of, by the simulator and by Table 2.
print(f"{'':10}{'idle':>6}{'Table 2':>9}{'share':>8}{'kept':>6}")
idle = {}
for name in ("1F1B", "ZB1P", "DualPipe"):
    found = simulate(schedule(name, RANKS, MICRO_BATCHES), costs)
    idle[name] = max(found.idle)
    by_formula = bubble_in_table_2(name, RANKS, costs)
    print(
        f"{name:10}{idle[name]:6.1f}{by_formula:9.1f}{found.bubble_fraction:8.1%}{max(found.peak_activations):6}"
    )

# 3. Where the formula holds exactly, it is what the simulator finds.
assert idle["1F1B"] == bubble_in_table_2("1F1B", RANKS, costs) == 21.0
assert idle["ZB1P"] == bubble_in_table_2("ZB1P", RANKS, costs) == 7.0
assert idle["DualPipe"] < idle["ZB1P"]
# docs/experiments/014 tells when DualPipe's formula is exact; docs/images has the pictures.
