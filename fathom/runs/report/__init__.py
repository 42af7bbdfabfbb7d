"""`report.html`: one self-contained page that tells a run, made from the files of its folder alone.

It can be made at any time, while the run goes on too, and again afterwards; nothing in the folder but the page changes.
"""

from __future__ import annotations

from pathlib import Path

from fathom.runs.folder import RunFolder
from fathom.runs.report.data import RunData
from fathom.runs.report.page import document

REPORT = "report.html"


def write_report(run_dir: str | Path) -> Path:
    """Write the report of a run folder and return its path.

    Raises `FathomError` when the folder is no run's, matplotlib is missing or the disk is full; the run itself is never
    touched.
    """
    folder = RunFolder(run_dir)
    folder.write(REPORT, document(RunData.read(folder.path)))
    return folder.path / REPORT
