"""`python -m fathom` is the command line."""

from __future__ import annotations

from fathom.cli import main

if __name__ == "__main__":
    main()
