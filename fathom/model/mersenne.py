"""Passing over numbers of torch's CPU generator without drawing them.

The generator is the Mersenne twister MT19937 (Matsumoto and Nishimura 1998): words of 32 bits, each made of earlier
ones by

    x[k + 624] = x[k + 397] ^ ((upper bit of x[k], lower 31 of x[k + 1]) A),

which is linear over the field of two elements. So every word is a sum of the first ones, and which of them is told by a
polynomial: with p(t) = t^n mod phi(t), phi the characteristic polynomial of the recurrence,

    x[n + j] = sum of x[i + j] over the powers t^i of p,   j >= 1,

where a sum is an exclusive or (Haramoto et al. 2008). phi has degree 19937 and 135 terms (section 3 of the first
paper), so t^n comes from squaring, of which n = 10^12 needs forty, and from folding what is above the degree back: some
ten milliseconds each. Python's integers are the polynomials, bit i the coefficient of t^i.

torch keeps 624 words at a time and how many of them are used up. A jump by a multiple of 624 leaves that count as it
is; what is left of a distance is drawn.
"""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
import torch

WORDS, MIDDLE, DEGREE = 624, 397, 19937
MATRIX = 0x9908B0DF
"""The last row of A, its lowest bit first in the polynomial."""
UPPER, LOWER = np.uint32(1 << 31), np.uint32((1 << 31) - 1)
UNIT = WORDS << 14
"""Words, ten million: what jumps are made of. Equal distances are then equal numbers of units, whose polynomials are
kept, and less than one is drawn in some hundredths of a second."""
PIECE = 1 << 20
"""Numbers drawn at a time to be dropped."""


def pass_over(generator: torch.Generator, count: int) -> None:
    """Bring a CPU generator into the state that it has after `count` float32 numbers (words of 32 bits) were drawn."""
    units, rest = divmod(count, UNIT)
    if units and knows_torch():
        jump(generator, units, UNIT)
    else:
        rest = count
    for begin in range(0, rest, PIECE):
        torch.empty(min(PIECE, rest - begin), dtype=torch.float32).uniform_(generator=generator)


def jump(generator: torch.Generator, units: int, unit: int) -> None:
    """The same for `units` times `unit` words, `unit` a multiple of 624."""
    state = generator.get_state()
    used_up, used, words = _places(state.numpy())
    words[:] = words_after(words.astype(np.uint32), power(units * unit - 1))
    if used_up[0] == 1:  # a fresh one says so without having used any
        used[0] = WORDS
    generator.set_state(state)


def _places(state: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """In the bytes of a generator's state: 1 where all words are used up, how many are used, the words."""
    return (
        state[8:12].view(np.int32),
        state[16:24].view(np.uint64),
        state[24 : 24 + 8 * WORDS].view(np.uint64),
    )


@cache
def knows_torch() -> bool:
    """Whether this torch keeps its state as we think; if not, numbers are drawn and dropped, which takes longer."""
    ours, drawn = (torch.Generator().manual_seed(5) for _ in range(2))
    count = 40 * WORDS
    try:
        jump(ours, 1, count)
    except (RuntimeError, ValueError, IndexError):
        return False
    torch.empty(count, dtype=torch.float32).uniform_(generator=drawn)
    return torch.equal(ours.get_state(), drawn.get_state())


# --- words ---------------------------------------------------------------------------------------


def words_after(words: np.ndarray, polynomial: int) -> np.ndarray:
    """uint32 [624], the words x[n + 1] ... x[n + 624] of x[0] ... x[623], where the polynomial is t^n mod phi."""
    sequence = _sequence(words, DEGREE + WORDS + 1)
    found = np.zeros(WORDS, np.uint32)
    data = np.frombuffer(polynomial.to_bytes(DEGREE // 8 + 1, "little"), np.uint8)
    for power_of_t in np.flatnonzero(np.unpackbits(data, bitorder="little")):
        found ^= sequence[power_of_t + 1 : power_of_t + 1 + WORDS]
    return found


def _sequence(words: np.ndarray, length: int) -> np.ndarray:
    """The recurrence; as many words at a time as do not depend on each other."""
    found, step = np.empty(length, np.uint32), WORDS - MIDDLE
    found[:WORDS] = words
    for begin in range(WORDS, length, step):
        end = min(begin + step, length)
        high, low = (
            found[begin - WORDS : end - WORDS],
            found[begin - WORDS + 1 : end - WORDS + 1],
        )
        joined = (high & UPPER) | (low & LOWER)
        found[begin:end] = found[begin - step : end - step] ^ (joined >> np.uint32(1))
        found[begin:end] ^= (joined & np.uint32(1)) * np.uint32(MATRIX)
    return found


# --- polynomials -----------------------------------------------------------------------------------


@cache
def characteristic() -> int:
    """phi(t) = (t^624 + t^397) (u^31 + a_0 u^30 + ... + a_30) + a_31, where u = t^623 + t^396 and A's last row is a."""
    inner = 1
    for bit in range(31):
        inner = (inner << WORDS - 1) ^ (inner << MIDDLE - 1) ^ (MATRIX >> bit & 1)
    return (inner << WORDS) ^ (inner << MIDDLE) ^ (MATRIX >> 31)


@cache
def _lower_terms() -> tuple[int, ...]:
    """The powers of phi below its degree."""
    return tuple(power for power in range(DEGREE) if characteristic() >> power & 1)


def _folded(polynomial: int) -> int:
    """mod phi."""
    while high := polynomial >> DEGREE:
        polynomial ^= high << DEGREE
        for term in _lower_terms():
            polynomial ^= high << term
    return polynomial


@lru_cache(64)
def power(exponent: int) -> int:
    """t^exponent mod phi."""
    found = 1
    for bit in f"{exponent:b}":
        squared = int(f"{found:b}", 4)  # over two elements, squaring puts a zero behind every bit
        found = _folded(squared << (bit == "1"))
    return found
