"""Speaking (report §3.4): sampling and generation on the latent cache."""

from __future__ import annotations

from fathom.inference.generate import Session, generate, stream
from fathom.inference.sampling import Sampling, sample
from fathom.inference.step import Step

__all__ = ["Sampling", "Session", "Step", "generate", "sample", "stream"]
