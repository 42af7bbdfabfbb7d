"""Functions of the C library: found, not found, and not looked for."""

from __future__ import annotations

import os
import sys

import pytest

from fathom.kernels.libc import libc


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_a_function_is_found() -> None:
    function = libc("getpid")
    assert function is not None and function() == os.getpid()
    assert libc("no_such_function") is None


def test_other_systems_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert libc("getpid") is None
