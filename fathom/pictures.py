"""Pictures in files of their own, for every package that draws some. matplotlib is an extra and imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fathom.errors import FathomError

SUFFIXES = (".png", ".svg", ".pdf")
"""Formats of pictures."""


def matplotlib() -> Any:
    """The library, its class `figure.Figure` with it: figures of that kind need no display and leave no trace.

    Raises `FathomError` when it is not installed.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ModuleNotFoundError:
        raise FathomError(
            "pictures need matplotlib, which is not installed; run: pip install 'fathom[report]'"
        ) from None
    return matplotlib


def check_picture(path: str | Path) -> None:
    """Raise `FathomError` for a picture that could not be saved; better before what it shows is computed."""
    matplotlib()
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise _refused(path, f"{path.suffix or 'no ending'} is no format of pictures here")
    if not path.parent.is_dir():
        raise _refused(path, f"there is no folder {path.parent}")


def save_picture(drawing: Any, path: str | Path, dpi: int) -> None:
    """Write a figure in the format that the suffix names, at `dpi` dots per inch. Raises `FathomError`."""
    check_picture(path)
    try:
        drawing.savefig(path, dpi=dpi)
    except OSError as error:
        raise _refused(Path(path), str(error)) from error


def _refused(path: Path, why: str) -> FathomError:
    return FathomError(
        f"{path} could not be drawn ({why}); name a .png, .svg or .pdf file in a folder that exists"
    )
