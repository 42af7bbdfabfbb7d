"""Reading text: what is found, in which order, and what happens to what is not text."""

from __future__ import annotations

import builtins
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fathom.data import Document, Rejects, read_documents
from fathom.errors import DataError


def read(source: str | Path) -> tuple[list[Document], Rejects]:
    rejects = Rejects()
    return list(read_documents(source, rejects)), rejects


def test_stdlib_is_python_source_without_tests_or_packages() -> None:
    documents, rejects = read("stdlib")
    names = [d.source for d in documents]
    assert "stdlib/json/decoder.py" in names and "stdlib/argparse.py" in names
    assert not [
        n for n in names if {"test", "tests", "idlelib", "site-packages"} & set(n.split("/"))
    ]
    assert not [n for n in names if "_sysconfigdata" in n]
    assert 7e6 < sum(len(d.text.encode()) for d in documents) < 2e7
    assert rejects.total == 0


def test_folder_is_read_sorted_and_junk_is_counted(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "x.py").write_text("print(1)\n")
    (tmp_path / "a.md").write_text("# Zürich\r\n", newline="")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Zürich".encode("latin-1"))
    (tmp_path / "zeros.txt").write_bytes(b"a\0b")
    (tmp_path / "photo.png").write_bytes(bytes(range(256)))
    (tmp_path / ".git" / "config.txt").write_text("hidden")
    documents, rejects = read(tmp_path)
    assert documents == [Document("# Zürich\r\n", "a.md"), Document("print(1)\n", "b/x.py")]
    assert rejects.counts == {"not UTF-8 text": 2, "not a known kind of text file": 1}
    assert rejects.summary().startswith("3 rejected (2 not UTF-8 text")


def test_a_named_file_is_text_whatever_it_is_called_and_loses_its_mark(tmp_path: Path) -> None:
    path = tmp_path / "notes.unknown"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert read(path)[0] == [Document("hello", "notes.unknown")]


def test_broken_jsonl_lines_are_quoted_and_the_others_read(tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": "one"}),
        '{"text": "cut of',
        "[1, 2]",
        '{"txet": 1}',
        '{"text": null}',
        '{"text": "\\ud800"}',
        "",
        "[" * 100_000,
        json.dumps({"text": "zwei ½"}),
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(b'{"text": "lost"}\n' * 999)[:-20])
    documents, rejects = read(tmp_path)
    assert [d.text for d in documents[:3]] == ["one", "zwei ½", "packed"]
    assert documents[1].source == "d.jsonl:9"
    assert rejects.counts['no text in field "text"'] == 3
    assert rejects.counts["broken JSON"] == 2 and rejects.counts["half a surrogate pair"] == 1
    assert rejects.counts["not readable"] == 1
    assert "d.jsonl:2" in rejects.examples[0] and "cut of" in rejects.examples[0]


def test_parquet_column_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), tmp_path / "a.parquet"
    )
    parquet.write_table(pyarrow.table({"other": ["x"]}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"no parquet at all")
    documents, rejects = read(tmp_path)
    assert documents == [Document("one", "a.parquet:1"), Document("two", "a.parquet:3")]
    assert rejects.counts == {
        'no text in field "text"': 1,
        'no column "text"': 1,
        "not readable as Parquet": 1,
    }


def test_parquet_text_that_is_not_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    broken = pyarrow.array([b"one", b"\xff\xfe", None, "zwei ½".encode()])
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(broken), broken.buffers())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    documents, rejects = read(tmp_path)
    assert [d.text for d in documents] == ["one", "zwei ½"]
    assert rejects.counts == {"not UTF-8 text": 1, 'no text in field "text"': 1}


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    real_import = builtins.__import__

    def without_pyarrow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    monkeypatch.delitem(sys.modules, "pyarrow", raising=False)
    with pytest.raises(DataError, match=r"pip install 'fathom\[data\]'"):
        read(tmp_path)


def test_a_missing_path_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read_documents(tmp_path / "nowhere", Rejects())
