"""The command line as a user meets it: one clear line and an exit status, never a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fathom
from fathom.cli import main
from fathom.cli.main import COMMANDS
from tests.cli.calling import call


def test_help_lists_every_command_and_imports_none() -> None:
    """In a process of its own, because torch is loaded in this one."""
    script = (
        "import sys\nfrom fathom.cli import main\n"
        "try: main(['--help'])\nfinally: assert 'torch' not in sys.modules, 'slow --help'"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, name, "--help")
    assert (status, err) == (0, "")
    assert f"fathom {name}" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version") == (0, f"fathom {fathom.__version__}\n", "")


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fathom", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"fathom {fathom.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["--frobnicate"], "No such option: --frobnicate"),
        (["report"], "Missing argument"),
        (["report", "nowhere"], "nowhere is not a run folder"),
        (["report", "a", "b"], "unexpected extra argument"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere does not exist"),
        (["generate", "nowhere", "--prompt", "x", "--seed", "y"], "Invalid value for '--seed'"),
        (["export", "nowhere", "there"], "nowhere does not exist"),
        (["export", "nowhere", "there", "--dtype", "int3"], "Invalid value for '--dtype'"),
    ],
)
def test_mistakes_get_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = call(capsys, *arguments)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys)
    assert status == 2 and "error" not in err
    assert "Commands" in out


def test_without_typer_the_remedy_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    status, _, err = call(capsys, "--help")
    assert status == 2
    assert err == "error: the command line needs typer; run: pip install 'fathom[cli]'\n"


def test_ctrl_c_is_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fathom.runs.report.write_report", interrupted)
    assert call(capsys, "report", str(tmp_path))[0] == 130


def test_faults_of_ours_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(folder: Path) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("fathom.runs.report.write_report", broken)
    with pytest.raises(ZeroDivisionError):
        main(["report", str(tmp_path)])
