"""Hugging Face directories in and out, GGUF files out."""

from fathom.interop.config_json import read_config
from fathom.interop.gguf import save_gguf
from fathom.interop.reading import load
from fathom.interop.writing import save

__all__ = ["load", "read_config", "save", "save_gguf"]
