"""Speaking (report §3.4): sampling and generation on the latent cache."""

from __future__ import annotations

from fathom.inference.engine import Engine
from fathom.inference.generate import generate
from fathom.inference.guide import Guide
from fathom.inference.outputs import Delta, Output
from fathom.inference.request import Ended, Request, Usage
from fathom.inference.sampling import Sampling

__all__ = [
    "Delta",
    "Ended",
    "Engine",
    "Guide",
    "Output",
    "Request",
    "Sampling",
    "Usage",
    "generate",
]
