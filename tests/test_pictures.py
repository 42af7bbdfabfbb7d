"""Pictures: refused before anything is drawn, saved in the format of their name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fathom.errors import FathomError
from fathom.pictures import SUFFIXES, check_picture, matplotlib, save_picture

BEGINNINGS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_suffix_says_the_format(suffix: str, tmp_path: Path) -> None:
    drawing = matplotlib().figure.Figure(figsize=(1, 1))
    save_picture(drawing, tmp_path / f"map{suffix.upper()}", dpi=20)
    assert (tmp_path / f"map{suffix.upper()}").read_bytes().startswith(BEGINNINGS[suffix])


@pytest.mark.parametrize(
    ("name", "why"),
    [("x.foo", ".foo is no format"), ("x", "no ending is no format"), ("gone/x.png", "no folder")],
)
def test_what_could_not_be_saved_is_refused_beforehand(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(FathomError, match=rf"{why}.*; name a \.png, \.svg or \.pdf file"):
        check_picture(tmp_path / name)


def test_a_file_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    with pytest.raises(FathomError, match=r"x\.png could not be drawn \(.*directory"):
        save_picture(matplotlib().figure.Figure(), tmp_path / "x.png", dpi=20)


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FathomError, match=r"pip install 'fathom\[report\]'"):
        check_picture("x.png")
