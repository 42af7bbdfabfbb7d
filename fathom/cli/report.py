"""`fathom report`: a run as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, for example runs/nano.")],
) -> None:
    """Write report.html into a run folder from what it holds; works while the run goes on too."""
    from fathom.runs.report import write_report

    print(write_report(run))
