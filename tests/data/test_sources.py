"""Reading text: what is found, in which order, and what happens to what is not text."""

from __future__ import annotations

import builtins
import errno
import gzip
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fathom.data import Document, Rejects, prepare, read_documents, readers
from fathom.data.readers import PartReader
from fathom.data.rejects import Reject
from fathom.data.sources import Source, parse_sources
from fathom.data.units import files_of, parts_of, units_of
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


def test_what_cannot_be_entered_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "shut").mkdir()
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(tmp_path / "pipe.txt")
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "shut":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    documents, rejects = read(tmp_path)
    assert [d.source for d in documents] == ["a.txt"]
    reasons = ("folder not readable", "link to a folder, not followed", "not a file")
    assert rejects.counts == dict.fromkeys(reasons, 1)


def test_names_that_are_no_text_are_spelled_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in (b"caf\xe9.txt", b"caf\xe9.bin"):
        Path(os.fsdecode(bytes(source) + b"/" + name)).write_text("some text to learn from " * 40)
    Path(os.fsdecode(bytes(source) + b"/l\xe9.txt")).symlink_to("nowhere")
    prepare(tmp_path / "out", [str(source)], "bpe", 300, held_out_kind="tail")
    assert json.loads((tmp_path / "out" / "files.json").read_text()) == {
        "source": ["caf\\udce9.txt"]
    }
    places = {json.loads(s)["place"] for s in (tmp_path / "out" / "rejects.jsonl").open()}
    assert places == {"caf\\udce9.bin", "l\\udce9.txt"}
    with pytest.raises(DataError, match=r"caf.*is not UTF-8; rename it"):
        parse_sources([os.fsdecode(b"caf\xe9")])


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


def test_zstd_beside_gzip(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    texts = [f"line {i * i * 7919 % 100_003}" for i in range(50_000)]
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    cut = len(lines) // 2 + 5  # within a line
    packed = zstandard.compress(lines[:cut]) + zstandard.compress(lines[cut:])
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(b"packed text"))
    (tmp_path / "c.jsonl.zst").write_bytes(packed[:-1000])
    (tmp_path / "d.md.zst").write_bytes(b"no zstd")
    (tmp_path / "e.txt.zst").write_bytes(zstandard.compress(b"cut off " * 99)[:-3])
    documents, rejects = read(tmp_path)
    assert [d.text for d in documents[:50_000]] == texts
    assert documents[50_000] == Document("packed text", "b.txt.zst")
    up_to_its_end = [d.text for d in documents[50_001:]]
    assert len(up_to_its_end) > 25_000 and up_to_its_end == texts[: len(up_to_its_end)]
    assert rejects.counts["not readable"] == 3 and set(rejects.counts) <= {
        "not readable",
        "broken JSON",
    }


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_a_large_jsonl_is_cut_anywhere_and_loses_no_line(size: int, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    lines = [json.dumps({"text": "x" * (i % 30) + f" {i}"}) if i % 5 else "" for i in range(60)]
    path.write_text("\n".join(lines))  # without a line end at the last
    (file,) = files_of(str(path), Rejects())
    readers = [PartReader(part) for part in parts_of(file, size)]
    texts = [text for reader in readers for _, text in reader]
    assert texts == [json.loads(line)["text"] for line in lines if line]
    assert sum(reader.rows for reader in readers) == 60
    assert sum(reader.blank for reader in readers) == 12


class Counting(io.FileIO):
    """Counts the bytes that are read from all of its kind."""

    read_in_all = 0

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        Counting.read_in_all += count or 0
        return count or 0


def test_a_line_longer_than_many_parts_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part looks for its own first line up to its own end and no further."""
    path, texts = tmp_path / "d.jsonl", ["a", "x" * 1_000_000, "b", "c" * 15_000, "d"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (file,) = files_of(str(path), Rejects())
    monkeypatch.setattr(readers, "_open", lambda path: io.BufferedReader(Counting(path)))
    parts = parts_of(file, 20_000)
    assert len(parts) > 50
    assert [text for part in parts for _, text in PartReader(part)] == texts
    assert file.size < Counting.read_in_all < 3 * file.size


def test_a_block_that_unpacks_to_a_thousand_times_its_size(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    text = "so it goes on " * 1_000_000
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(json.dumps({"text": text}).encode()))
    assert path.stat().st_size < 131_072, "one read unpacks it all"
    assert [d.text for d in read(path)[0]] == [text]


def test_units_hold_every_part_once_and_no_more_than_their_size(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text("x" * (10 * i % 90))
    (tmp_path / "20.jsonl").write_text("[]\n" * 500)
    files = files_of(str(tmp_path), Rejects())
    units = list(units_of(0, files, 100))
    parts = [part for unit in units for part in unit.parts]
    assert parts == [part for file in files for part in parts_of(file, 100)]
    assert all(unit.bytes <= 100 for unit in units) and len(units) > 15
    assert [n for unit in units for n in unit.files] == sorted(n for u in units for n in u.files)


def test_parquet_is_cut_at_row_groups(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"row {i} " * 20 for i in range(100)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=9, compression="none")
    (file,) = files_of(str(path), Rejects())
    parts = parts_of(file, file.size // 4)
    assert len(parts) > 3
    assert [text for part in parts for _, text in PartReader(part)] == texts


def test_hugging_face_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    texts = [f"row {i} of the set" for i in range(300)]
    rows = datasets.Dataset.from_dict({"text": texts, "n": list(range(300))})
    rows.save_to_disk(tmp_path / "one")
    splits = {"train": rows.select(range(200)), "validation": rows.select(range(200, 300))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    rows.rename_column("text", "content").save_to_disk(tmp_path / "other")
    for source in (tmp_path / "one", f"hf:{tmp_path / 'one'}"):
        documents, _ = read(source)
        assert [d.text for d in documents] == texts and documents[4].source == "one:5"
    assert [d.text for d in read(tmp_path / "two")[0]] == texts[:200]
    assert [d.text for d in read(f"hf:{tmp_path / 'two'}::validation")[0]] == texts[200:]
    with pytest.raises(DataError, match=r"no split 'test'; take one of train, validation"):
        read(f"hf:{tmp_path / 'two'}::test")
    assert read(tmp_path / "other")[1].counts == {'no column "text"': 1}
    (file,) = files_of(str(tmp_path / "one"), Rejects())
    parts = parts_of(file, file.size // 3)
    assert len(parts) > 2 and [t for part in parts for _, t in PartReader(part)] == texts


def test_names_of_sources(tmp_path: Path) -> None:
    (tmp_path / "a=b.txt").write_text("x")
    found = parse_sources(["stdlib", "web=/data/web.jsonl.gz", "/data/web.jsonl.gz", f"{tmp_path}/a=b.txt",
        "/more/web.parquet", "hf:allenai/c4:en"])  # fmt: skip
    assert [source.name for source in found] == [
        "stdlib",
        "web",
        "web-2",
        "a-b",
        "web-3",
        "c4",
    ]
    assert found[1] == Source("web", "/data/web.jsonl.gz") and found[3].path.endswith("a=b.txt")
    with pytest.raises(DataError, match="two sources are called 'a'"):
        parse_sources(["a=x", "a=y"])
    with pytest.raises(DataError, match="the source name 'a b' is not usable"):
        parse_sources(["a b=x"])


def test_rejects_quote_what_stood_there(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "cut' + b"x" * 1000 + b"\n")
    ((row, found),) = PartReader(parts_of(files_of(str(tmp_path / "d.jsonl"), Rejects())[0])[0])
    assert row == 1 and isinstance(found, Reject)
    assert (
        found.reason == "broken JSON"
        and found.quote.startswith('{"text": "cutxx')
        and len(found.quote) == 200
    )
