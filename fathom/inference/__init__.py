"""Speaking (report §3.4): sampling and generation on the latent cache."""

from __future__ import annotations

from fathom.inference.generate import Session, generate, stream
from fathom.inference.sampling import Sampling, sample

__all__ = ["Sampling", "Session", "generate", "sample", "stream"]
