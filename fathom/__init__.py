"""fathom: one code base for the whole life of a DeepSeek-V3 model (arXiv 2412.19437).

>>> model = fathom.Transformer(fathom.ModelConfig(**fields))
>>> fathom.losses(model, tokens).total.backward()
>>> fathom.save(model, "folder"); model = fathom.load("folder")

Names are imported when first used, so that `import fathom` costs nothing that is not needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Engine": "fathom.inference",
    "FathomError": "fathom.errors",
    "Guide": "fathom.inference",
    "LatentCache": "fathom.model",
    "ModelConfig": "fathom.model",
    "ModelOutput": "fathom.model",
    "Sampling": "fathom.inference",
    "Transformer": "fathom.model",
    "load": "fathom.interop",
    "load_recipe": "fathom.runs.recipe",
    "losses": "fathom.model",
    "route": "fathom.model",
    "save": "fathom.interop",
    "save_gguf": "fathom.interop",
    "update_bias": "fathom.model",
}

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from fathom.errors import FathomError as FathomError
    from fathom.inference import Engine as Engine
    from fathom.inference import Guide as Guide
    from fathom.inference import Sampling as Sampling
    from fathom.interop import load as load
    from fathom.interop import save as save
    from fathom.interop import save_gguf as save_gguf
    from fathom.model import LatentCache as LatentCache
    from fathom.model import ModelConfig as ModelConfig
    from fathom.model import ModelOutput as ModelOutput
    from fathom.model import Transformer as Transformer
    from fathom.model import losses as losses
    from fathom.model import route as route
    from fathom.model import update_bias as update_bias
    from fathom.runs.recipe import load_recipe as load_recipe


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fathom' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
