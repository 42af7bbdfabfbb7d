"""Lesson 3 — rotary positions and YaRN (report eqs 3 and 8, §4.3).

RoPE turns pair j of a vector by (position x theta_j), theta_j = 10000^(-2j/64). Turning query and
key alike makes their product depend on the distance alone. To read 40 times more text than in
pre-training, YaRN slows the slow pairs down by 40, leaves the fast ones, and blends between pairs
10 and 23.
"""

import math

import torch

import fathom
from fathom.kernels import rotate
from fathom.model.rope import RotaryTable, correction_range, inverse_frequencies, softmax_scale

yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
plain = fathom.ModelConfig()
long = plain.replace(rope_scaling=yarn, max_position_embeddings=163840)

# 1. Only the distance counts.
torch.manual_seed(0)
query, key = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)
table = RotaryTable(plain)


def score(at_query: int, at_key: int) -> float:
    """The product of the query and the key, each at its position."""
    q = rotate(query, table.at(torch.tensor([[at_query]])))
    k = rotate(key, table.at(torch.tensor([[at_key]])))
    return float((q * k).sum())


for pair in ((9, 2), (1009, 1002), (9, 3)):
    print(f"query and key at positions {pair}: score {score(*pair):.4f}")
assert math.isclose(score(9, 2), score(1009, 1002), abs_tol=2e-3)
assert not math.isclose(score(9, 2), score(9, 3), abs_tol=2e-3)

# 2. In 4,096 tokens some pairs turn 32 times and more (kept), some less than once (slowed down).
low, high = correction_range(64, 10000.0, 4096, beta_fast=32, beta_slow=1)
before, after = inverse_frequencies(plain), inverse_frequencies(long)
print(f"the blend runs from pair {low} to pair {high}")
for j in (0, 10, 16, 23, 31):
    turns, slower = before[j].item() * 4096 / (2 * math.pi), (before[j] / after[j]).item()
    print(f"pair {j:2}: {turns:7.2f} turns in 4,096 tokens, slowed down {slower:5.2f} times")
assert (low, high) == (10, 23)
assert torch.equal(before[:11], after[:11]) and torch.allclose(before[23:] / 40, after[23:])

# 3. More tokens would blur the softmax, so YaRN sharpens it: its scale takes mscale squared.
mscale = 0.1 * 1.0 * math.log(40) + 1
print(f"mscale {mscale:.4f}: scale {softmax_scale(plain):.7f} becomes {softmax_scale(long):.7f}")
assert math.isclose(softmax_scale(plain), 192**-0.5)
assert math.isclose(softmax_scale(long), 192**-0.5 * mscale**2)
assert round(softmax_scale(long), 7) == 0.1352338
