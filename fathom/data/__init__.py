"""Text in, batches of tokens out (report §4.1): sources, tokenizer, prepared tokens, loader.

The loader alone is imported when first used: it needs torch, which the worker processes of `prepare` do without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fathom.data.prepare import prepare
from fathom.data.prepared import TokenData
from fathom.data.rejects import Rejects
from fathom.data.shards import Tokens
from fathom.data.sources import Document, read_documents
from fathom.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fathom.data.loader import Loader, held_out_batches

__all__ = [
    "Document",
    "Loader",
    "Rejects",
    "TokenData",
    "Tokenizer",
    "Tokens",
    "held_out_batches",
    "prepare",
    "read_documents",
]


def __getattr__(name: str) -> Any:
    if name not in ("Loader", "held_out_batches"):
        raise AttributeError(f"module 'fathom.data' has no attribute {name!r}")
    from fathom.data import loader

    return getattr(loader, name)
