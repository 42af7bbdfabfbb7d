"""The randomness of sampling, as a pure function of (seed, position, token).

Drawing a token from softmax(z) is the same as taking the largest z_v + G_v with independent Gumbel
noise G (the Gumbel-max trick). Here G_v is made by hashing the request's seed, the number of the
token in its answer, and v. So there is no generator whose state must be carried: the same request
gives the same answer in any batch, after any preemption, on any device, with speculation and
without. Speculation needs no accept-reject rule either: draft and model draw with the *same* noise,
the model's own choice is always the one that counts, and a draft is right when it is equal (drafter
invariance; Daliri, Musco and Suresh 2024 show that it is right at least (1 - d)/(1 + d) of the time
for distributions at total variation d, where an accept-reject rule reaches 1 - d).

Instead of adding -log(E) to z, callers may divide by E, which is exponential: one logarithm less.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(value: int) -> int:
    """splitmix64's finaliser of a 64-bit number: every bit of it changes half of the result's."""
    value = (value ^ value >> 30) * _FIRST & _MASK
    value = (value ^ value >> 27) * _SECOND & _MASK
    return value ^ value >> 31


def key_of(seed: int, position: int) -> int:
    """Key of one draw."""
    return mix(mix((seed + _STEP) & _MASK) + position * _STEP & _MASK)


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    return value - (1 << 64) if value >> 63 else value


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of an unsigned number; torch's own shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: Tensor) -> Tensor:
    """`mix` of each int64."""
    x = (x ^ _shifted(x, 30)) * _signed(_FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(_SECOND)
    return x ^ _shifted(x, 31)


def exponential(keys: list[int], vocabulary: int, device: torch.device) -> Tensor:
    """Independent exponential numbers float64 [B, V], one row for each key."""
    key_B1 = torch.tensor([_signed(key) for key in keys], device=device)[:, None]
    token_V = torch.arange(1, vocabulary + 1, device=device) * _signed(_STEP)
    bits = _shifted(_mixed(key_B1 + token_V), 12)  # 52, so that adding a half is exact
    return ((bits + 0.5) * 2.0**-52).log_().neg_()
