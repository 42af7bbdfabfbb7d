"""`fathom tokenizer`: learns, says what came of it, shows how a text is cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from fathom.data import Tokenizer
from tests.cli.calling import call


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text("def greet(name):\n    return name\n" * 50)
    return path


def test_learn_then_show(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made"
    status, said, err = call(capsys, "tokenizer", text, "--out", out, "--vocab-size", 290)
    assert (status, err) == (0, "")
    assert "1 documents, 0.0 MB" in said and "all read; merging" in said
    learned = Tokenizer.load(out)
    assert f"{out}: 290 ids" in said and f"; {learned.placeholders} place holders" in said
    files = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in out.iterdir()} == files

    status, said, err = call(capsys, "tokenizer", out, "--show", "def greet(x):\n")
    assert (status, err) == (0, "")
    first, second, *_, last = said.splitlines()
    assert first == f"def  {learned.encode('def')[0]}"
    assert second.startswith("·greet  ") and "):↵  " in said
    assert last.startswith(f"{len(learned.encode('def greet(x):' + chr(10)))} tokens in 4 pieces")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["TEXT"], "needs --out DIR and --vocab-size N"),
        (["TEXT", "--out", "OUT"], "needs --out DIR and --vocab-size N"),
        (["TEXT", "--out", "OUT", "--vocab-size", "12"], "vocab_size=12 is too small"),
        (["nowhere", "--out", "OUT", "--vocab-size", "300"], "nowhere"),
        (["TEXT", "--out", "INSIDE", "--vocab-size", "300"], "text.py is no folder"),
        (["TEXT", "TEXT", "--show", "x"], "--show takes one tokenizer"),
        (["TEXT", "--show", "x"], "not a tokenizer"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"TEXT": text, "OUT": tmp_path / "made", "INSIDE": text / "made"}
    status, _, err = call(capsys, "tokenizer", *(places.get(word, word) for word in arguments))
    assert status == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "made").exists()


def test_a_tokenizer_is_not_overwritten(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text("precious")
    status, _, err = call(capsys, "tokenizer", text, "--out", tmp_path, "--vocab-size", 300)
    assert status == 2 and "already holds a tokenizer" in err
    assert (tmp_path / "tokenizer.json").read_text() == "precious"
