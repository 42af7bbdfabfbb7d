"""Lesson 2 — absorption (report §2.1.1, eqs 2, 5, 10): decoding without ever making keys and
values.

A query meets a key as q . (W_UK c), which is (W_UK^T q) . c. So the query can go into the latent
space, once, instead of every cached token coming out of it. The values wait likewise: sum_j a_j
(W_UV c_j) is W_UV (sum_j a_j c_j). The numbers are the same; the work per cached token is not.
"""

import timeit
from collections.abc import Callable

import torch
from torch import Tensor

import fathom
from fathom.kernels import absorbed_attention

torch.manual_seed(0)
heads, nope, rope, value, rank, cached = 16, 64, 32, 64, 256, 2048
up = torch.randn(heads, nope + value, rank) / rank**0.5  # W_UK and W_UV of every head
memory = torch.randn(1, cached, rank + rope)  # the cache: latents and shared rotated keys
q_nope, q_rope = torch.randn(1, 1, heads, nope), torch.randn(1, 1, heads, rope)
scale = (nope + rope) ** -0.5


def expanded() -> Tensor:
    """Eqs 2, 5, 10 as they are written: keys and values of all cached tokens, then attention."""
    latent, k_rope = memory.split((rank, rope), dim=-1)
    kv = torch.einsum("bsc,hxc->bhsx", latent, up)
    k, v = kv.split((nope, value), dim=-1)
    scores = torch.einsum("bthd,bhsd->bhts", q_nope, k) + torch.einsum(
        "bthr,bsr->bhts", q_rope, k_rope
    )
    return torch.einsum("bhts,bhsv->bthv", (scores * scale).softmax(-1), v).flatten(2)


def absorbed() -> Tensor:
    """The same in the latent space."""
    return absorbed_attention(q_nope, q_rope, memory, up, nope, scale, None)


def fastest(function: Callable[[], Tensor]) -> float:
    """Seconds of the fastest of ten runs."""
    return min(timeit.repeat(function, number=1, repeat=10))


difference = (expanded() - absorbed()).abs().max().item()
slow, fast = fastest(expanded), fastest(absorbed)
print(f"one new token, {cached} cached: outputs differ by at most {difference:.1e}")
print(f"expanded {slow * 1e3:.2f} ms, absorbed {fast * 1e3:.2f} ms: {slow / fast:.0f} times faster")
assert difference < 1e-4 and slow > 2 * fast

v3 = fathom.ModelConfig()
# The released model, per head and cached token: expanding it, or meeting it in the latent space.
per_key = 2 * v3.kv_lora_rank * (v3.qk_nope_head_dim + v3.v_head_dim)
inside = 2 * (2 * v3.kv_lora_rank + v3.qk_rope_head_dim)
print(f"released model: {per_key:,} FLOPs to expand one token for one head, {inside:,} to absorb")
assert per_key // inside == 120
