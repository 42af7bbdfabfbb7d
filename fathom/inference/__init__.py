"""Speaking (report §3.4): sampling and generation on the latent cache."""

from __future__ import annotations

from fathom.inference.generate import Session, generate, stream
from fathom.inference.layout import lay_out_for_decoding
from fathom.inference.sampling import Sampling, sample

__all__ = ["Sampling", "Session", "generate", "lay_out_for_decoding", "sample", "stream"]
