"""`report.html`: one self-contained page that tells a run, made from the files of its folder alone.

It can be made at any time, while the run goes on too, and again afterwards; nothing in the folder but the page changes.
"""

from __future__ import annotations

import os
from pathlib import Path

from fathom.runs.report_data import RunData
from fathom.runs.report_page import page

REPORT = "report.html"


def write_report(run_dir: str | Path) -> Path:
    """Write the report of a run folder and return its path.

    Raises `FathomError` when the folder is no run's or matplotlib is missing; the run itself is never touched.
    """
    folder = Path(run_dir)
    text = page(RunData.read(folder))
    unfinished = folder / f".{REPORT}.tmp"
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, folder / REPORT)
    return folder / REPORT
