"""Hugging Face directories in and out."""

from fathom.interop.config_json import read_config
from fathom.interop.reading import load
from fathom.interop.writing import save

__all__ = ["load", "read_config", "save"]
