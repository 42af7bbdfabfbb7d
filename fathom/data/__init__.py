"""Text in, batches of tokens out (report §4.1): sources, tokenizer, prepared tokens, loader."""

from __future__ import annotations

from fathom.data.loader import Loader, held_out_batches
from fathom.data.prepare import TokenData, prepare
from fathom.data.sources import Document, Rejects, read_documents
from fathom.data.tokenizer import Tokenizer

__all__ = [
    "Document",
    "Loader",
    "Rejects",
    "TokenData",
    "Tokenizer",
    "held_out_batches",
    "prepare",
    "read_documents",
]
