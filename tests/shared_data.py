"""Where optional outside data lies; a test that needs a file which is not there is skipped with a reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent


def shared_data(relative: str) -> Path:
    """Path of an outside data file (FATHOM_SHARED_DATA, or shared/data beside the repository), or skip."""
    folder = Path(os.environ.get("FATHOM_SHARED_DATA", _ROOT.parent / "shared" / "data"))
    path = folder / relative
    if not path.exists():
        pytest.skip(f"outside data file {relative} is not at hand")
    return path
