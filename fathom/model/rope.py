"""Rotary positions and YaRN (report eqs 3 and 8, §4.3).

RoPE turns each pair of the rotary dimensions by `position * theta_j`, theta_j = base^(-2j/R). YaRN
keeps the fast pairs (more than `beta_fast` turns over the original context), divides the slow ones
(fewer than `beta_slow` turns) by the factor s, and blends linearly between. It also sharpens the
softmax: the released model multiplies the scale 1/sqrt(d_h + d_h^R) by mscale^2, where
mscale = 0.1 * mscale_all_dim * ln s + 1.

Report §4.3 says that YaRN is applied to the shared key only; query and key must turn alike for
their product to depend on the distance alone, and the released code turns both.

Here are the angles; `fathom.kernels.rotary` turns. Shapes: B batch, T positions, R rotary dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fathom.kernels import Rotation
from fathom.model.config import ModelConfig


def correction_range(
    rope_dim: int,
    base: float,
    original: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool = True,
) -> tuple[float, float]:
    """Pair indices between which YaRN blends (10 and 23 at the released settings)."""

    def pair_with_turns(turns: float) -> float:
        return rope_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_with_turns(beta_fast), pair_with_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, rope_dim - 1)


def mscale(factor: float, coefficient: float = 1.0) -> float:
    """sqrt(t) of report §4.3: 0.1 * coefficient * ln(factor) + 1, and 1 without stretching."""
    return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1 else 1.0


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """theta_j for every pair, float32 [R/2], stretched by YaRN when the configuration says so."""
    dim, base = config.qk_rope_head_dim, config.rope_theta
    theta = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
    scaling = config.rope_scaling
    if scaling is None:
        return theta
    low, high = correction_range(
        dim,
        base,
        scaling["original_max_position_embeddings"],
        scaling.get("beta_fast") or 32,
        scaling.get("beta_slow") or 1,
        scaling.get("truncate", True),
    )
    pair = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    ramp = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
    return theta / scaling["factor"] * ramp + theta * (1 - ramp)


def magnitude(config: ModelConfig) -> float:
    """Factor on cos and sin, 1 unless YaRN is on.

    1 too when both mscale keys are equal (as released); mscale(s) when they are absent.
    """
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    first, second = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if first and second:
        return mscale(scaling["factor"], first) / mscale(scaling["factor"], second)
    return mscale(scaling["factor"])


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(d_h + d_h^R), times mscale^2 under YaRN.

    At the released settings 0.0721688 becomes 0.1352338.
    """
    scale = config.qk_head_dim**-0.5
    scaling = config.rope_scaling
    if scaling is not None and scaling.get("mscale_all_dim"):
        scale *= mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
    return scale


class RotaryTable:
    """Angles for the positions asked, with consecutive positions from 0 kept for the next call."""

    def __init__(self, config: ModelConfig) -> None:
        self.theta = inverse_frequencies(config)
        self.magnitude = magnitude(config)
        self.interleave = config.rope_interleave
        self._kept: Rotation | None = None

    def at(self, positions: Tensor) -> Rotation:
        """Rotation at int64 `positions` [B or 1, T]."""
        angles = positions[..., None].to(torch.float32) * self.theta.to(positions.device)
        cos, sin = angles.cos() * self.magnitude, angles.sin() * self.magnitude
        return Rotation(cos[:, :, None], sin[:, :, None], self.interleave)

    def first(self, length: int, device: torch.device, start: int = 0) -> Rotation:
        """Rotation at positions start ... start + length - 1: [1, length, 1, R/2]."""
        end = start + length
        kept = self._kept
        if kept is None or kept.cos.shape[1] < end or kept.cos.device != device:
            grown = 1 << (end - 1).bit_length()
            # Kept for training too, which cannot use what inference mode makes.
            with torch.inference_mode(False), torch.no_grad():
                kept = self.at(torch.arange(grown, device=device)[None])
            self._kept = kept
        return Rotation(kept.cos[:, start:end], kept.sin[:, start:end], self.interleave)
