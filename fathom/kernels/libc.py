"""Functions of Linux's C library that Python has no door to."""

from __future__ import annotations

import ctypes
import sys
from typing import Any


def libc(name: str) -> Any | None:
    """The function of that name; None on other systems, and where this C library has none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None)[name]
    except (OSError, AttributeError):
        return None
