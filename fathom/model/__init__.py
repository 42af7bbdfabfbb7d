"""The architecture (report §2) for one device."""

from fathom.model.cache import LatentCache
from fathom.model.config import ModelConfig
from fathom.model.objective import Losses, losses, update_bias
from fathom.model.router import route
from fathom.model.transformer import ModelOutput, Transformer

__all__ = [
    "LatentCache",
    "Losses",
    "ModelConfig",
    "ModelOutput",
    "Transformer",
    "losses",
    "route",
    "update_bias",
]
