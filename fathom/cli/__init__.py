"""The command line: one thin command per file, put together in `main`."""

from __future__ import annotations

from fathom.cli.main import main as main
