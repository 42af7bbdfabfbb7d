"""The command line called as a user calls it, in this process."""

from __future__ import annotations

import pytest

from fathom.cli import main


def status_of(*arguments: object) -> int:
    """Exit status of `fathom ARGUMENTS`."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `fathom ARGUMENTS`."""
    status = status_of(*arguments)
    out, err = capsys.readouterr()
    return status, out, err
