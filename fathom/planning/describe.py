"""The table that `fathom run --dry-run` prints: a stage's cost in words that a person reads."""

from __future__ import annotations

from fathom.model import ModelConfig
from fathom.planning.flops import flops_per_token
from fathom.planning.memory import cache_bytes_per_token, training_memory
from fathom.planning.parameters import count_parameters


def describe(
    config: ModelConfig,
    *,
    seq_len: int,
    micro_batch: int,
    tokens: int,
    mtp: bool = True,
    recompute: bool = False,
    compute_bytes: int = 4,
    on_cpu: bool = True,
    flops_per_second: float | None = None,
) -> list[tuple[str, str]]:
    """Rows (what, how much) for one training stage of `tokens` tokens.

    `micro_batch` is in sequences; `flops_per_second` is what the machine is expected to reach in training,
    not its peak; without it no time is given.
    """
    p = count_parameters(config)
    per_token = flops_per_token(config, seq_len, mtp)
    memory = training_memory(
        config,
        seq_len,
        micro_batch,
        compute_bytes=compute_bytes,
        recompute=recompute,
        mtp=mtp,
        on_cpu=on_cpu,
    )
    rows = [
        ("parameters", f"{human(p.main)} ({p.main:,}) and {human(p.mtp)} in MTP modules"),
        ("active per token", f"{human(p.active)}, {human(p.active_blocks)} in the blocks"),
        ("latent cache", f"{cache_bytes_per_token(config, compute_bytes):,} bytes per token"),
        ("work per token", f"{human(per_token)} floating-point operations at {seq_len} tokens"),
        ("work in all", f"{per_token * tokens:.3g} operations for {human(tokens)} tokens"),
        ("memory", f"about {gib(memory.total)}, of which"),
        ("  weights", gib(memory.weights)),
        ("  gradients", gib(memory.gradients)),
        ("  moments", gib(memory.moments)),
        ("  activations", f"{gib(memory.activations)} at {micro_batch} × {seq_len} tokens"),
        ("  logits", f"{gib(memory.logits)}, a chunk and the head's gradients"),
    ]
    if flops_per_second:
        seconds = per_token * tokens / flops_per_second
        rows.append(
            ("time", f"about {duration(seconds)} at {human(flops_per_second)} operations/s")
        )
    return rows


def human(number: float, digits: int = 3) -> str:
    """A number with so many digits, at least three, and K, M, B or T: 14.6T, with four 14.63T."""
    rounded_up = 1 - 0.5 * 10**-digits
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= rounded_up * size:
            figure = number / size
            return (
                f"{figure:.{digits}g}{unit}"
                if figure < 1000 * rounded_up
                else f"{figure:.0f}{unit}"
            )
    return f"{number:.{digits}g}"


def gib(size: int) -> str:
    """Bytes as MiB or GiB."""
    if size < 2**30:
        return f"{size / 2**20:,.0f} MiB"
    return f"{size / 2**30:,.1f} GiB" if size < 2**40 else f"{size / 2**30:,.0f} GiB"


def duration(seconds: float) -> str:
    """A time span in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} min"
    if seconds < 2 * 86400:
        return f"{seconds / 3600:.1f} h"
    days = seconds / 86400
    return f"{days:,.0f} days" if days < 730 else f"{days / 365.25:,.0f} years"
