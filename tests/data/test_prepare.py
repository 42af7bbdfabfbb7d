"""From text to token files: the split never leaks, the folder is whole or not there, and only once made."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data import TokenData, Tokenizer, Tokens, prepare
from fathom.data.split import Split
from fathom.errors import DataError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 documents of different length with a name of their own in each, and a copy of every tenth."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(200):
        text = (
            f"document number {i} begins.\n"
            + f"line of {i}\n" * (1 + i % 13)
            + f"document {i} ends.\n"
        )
        (folder / f"{i:03}.txt").write_text(text)
        if i % 10 == 0:
            (folder / f"{i:03}-copy.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    return prepare(tmp_path_factory.mktemp("out") / "data", [str(corpus)], "bpe", 400, held_out=0.2)


def documents(data: TokenData, side: Tokens) -> list[str]:
    texts = data.tokenizer.decode(np.asarray(side).tolist()).split("<｜end▁of▁sentence｜>")
    assert texts.pop() == ""
    return texts


def test_every_document_lies_on_one_side_once(corpus: Path, prepared: TokenData) -> None:
    train, held_out = documents(prepared, prepared.train), documents(prepared, prepared.held_out)
    assert sorted(train + held_out) == sorted(p.read_text() for p in corpus.iterdir())
    assert not set(train) & set(held_out)
    assert 20 < len(held_out) < 75


def test_documents_are_shuffled(prepared: TokenData) -> None:
    numbers = [int(text.split()[2]) for text in documents(prepared, prepared.train)]
    neighbours = sum(abs(a - b) <= 1 for a, b in pairwise(numbers))
    assert neighbours < 25  # copies of one document stay together, files next to each other do not


def test_manifest_counts(corpus: Path, prepared: TokenData) -> None:
    manifest = prepared.manifest
    held_out = documents(prepared, prepared.held_out)
    assert manifest["documents"] == {"train": 220 - len(held_out), "held_out": len(held_out)}
    assert manifest["bytes"]["held_out"] == sum(len(t.encode()) for t in held_out)
    assert manifest["tokens"]["train"] == len(prepared.train)
    assert sum(manifest["bytes"].values()) == sum(p.stat().st_size for p in corpus.iterdir())
    for side, tokens in (("train", prepared.train), ("held_out", prepared.held_out)):
        assert prepared.bytes_per_token(side) == manifest["bytes"][side] / len(tokens)
    assert prepared.train.dtype == np.uint16


@given(st.text(min_size=1), st.integers(), st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_tail_split_cuts_each_text_once(text: str, seed: int, share: float) -> None:
    text = text.encode("utf-8", "ignore").decode()
    pieces = list(Split("tail", share, seed).pieces(text))
    assert "".join(p.text for p in pieces) == text
    held_out = sum(len(p.text) for p in pieces if p.held_out)
    assert abs(held_out - share * len(text)) <= 0.5 + 1e-9
    assert [p.held_out for p in pieces] == sorted(p.held_out for p in pieces)


def test_tail_of_one_text_by_character_is_exact(tmp_path: Path) -> None:
    text = "".join(chr(97 + i * i % 26) for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    data = prepare(tmp_path / "out", [str(tmp_path / "a.txt")], "char", None, 0.1, "tail")
    assert data.tokenizer.decode(np.asarray(data.train).tolist()) == text[:900]
    assert data.tokenizer.decode(np.asarray(data.held_out).tolist()) == text[900:]
    assert data.bytes_per_token("held_out") == 1


def test_one_document_falls_back_to_its_tail(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("a long book without an end. " * 400)
    said: list[str] = []
    data = prepare(
        tmp_path / "out", [str(tmp_path / "book.txt")], "bpe", 300, 0.05, say=said.append
    )
    assert (
        data.manifest["held_out_kind"] == "tail"
        and data.manifest["settings"]["held_out_kind"] == "documents"
    )
    assert len(data.held_out) < len(data.train) / 10
    assert any("tail" in line for line in said)


def test_tokenizer_does_not_learn_from_the_held_out_side(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcabcabc " * 90 + "xyzxyzxyz " * 10)
    data = prepare(tmp_path / "out", [str(tmp_path / "a.txt")], "bpe", 300, 0.1, "tail")
    assert len(data.tokenizer.encode("abcabc")) < 4 and len(data.tokenizer.encode("xyzxyz")) == 6


def test_again_is_the_same_and_reads_nothing(corpus: Path, tmp_path: Path) -> None:
    first = prepare(tmp_path / "data", [str(corpus)], "bpe", 400, seed=3)
    shard = tmp_path / "data" / corpus.name / "train-00000.bin"
    stamp = shard.stat().st_mtime_ns
    said: list[str] = []
    second = prepare(tmp_path / "data", [str(corpus)], "bpe", 400, seed=3, say=said.append)
    assert said == [] and shard.stat().st_mtime_ns == stamp
    assert np.array_equal(first.train, second.train)
    other = prepare(tmp_path / "other", [str(corpus)], "bpe", 400, seed=3)
    assert other.manifest == first.manifest
    assert (tmp_path / "data" / "tokenizer.json").read_bytes() == (
        tmp_path / "other" / "tokenizer.json"
    ).read_bytes()


def test_other_settings_are_refused_with_the_difference(corpus: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "data", [str(corpus)], "bpe", 300)
    with pytest.raises(DataError, match=r"vocab_size 300 there, 301 now; seed 0 there, 1 now"):
        prepare(tmp_path / "data", [str(corpus)], "bpe", 301, seed=1)


def test_foreign_and_damaged_folders_are_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="is not prepared data"):
        prepare(tmp_path / "mine", [str(corpus)], "bpe", 300)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    prepare(tmp_path / "data", [str(corpus)], "bpe", 300)
    with open(tmp_path / "data" / corpus.name / "train-00000.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"train-00000.bin has 100 bytes"):
        TokenData.open(tmp_path / "data")
    (tmp_path / "data" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="no sound manifest"):
        TokenData.open(tmp_path / "data")


def _killed_at(step: int, out: Path, corpus: Path) -> None:
    said = 0

    def kill(line: str) -> None:
        nonlocal said
        said += 1
        if said == step:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare(out, [str(corpus)], "bpe", 400, held_out=0.2, say=kill)


@pytest.mark.parametrize("step", [2, 4])
def test_made_again_after_a_kill(
    step: int, corpus: Path, prepared: TokenData, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    process = multiprocessing.get_context("spawn").Process(
        target=_killed_at, args=(step, out, corpus)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists() and (tmp_path / ".data.building").exists()
    again = prepare(out, [str(corpus)], "bpe", 400, held_out=0.2)
    assert np.array_equal(again.train, prepared.train) and again.manifest == prepared.manifest
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_a_tokenizer_made_elsewhere(corpus: Path, prepared: TokenData, tmp_path: Path) -> None:
    prepared.tokenizer.save(tmp_path / "t")
    data = prepare(tmp_path / "data", [str(corpus)], str(tmp_path / "t"), 512)
    assert data.manifest["tokenizer_fingerprint"] == prepared.tokenizer.fingerprint
    with pytest.raises(DataError, match=r"has 400 ids, the model's vocab_size is 399"):
        prepare(tmp_path / "data2", [str(corpus)], str(tmp_path / "t"), 399)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 50)
    data = prepare(tmp_path / "data", [str(tmp_path / "a.txt")], "bpe", 70_000)
    assert data.train.dtype == np.uint32 and data.manifest["unused_tokens"] > 69_000


def test_nothing_usable_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk").mkdir()
    for i in range(3):
        (tmp_path / "junk" / f"{i}.bin").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match="there is no text in it"):
        prepare(tmp_path / "out", [str(tmp_path / "empty")], "bpe", 300)
    with pytest.raises(DataError, match="3 rejected"):
        prepare(tmp_path / "out", [str(tmp_path / "junk")], "bpe", 300)
    with pytest.raises(DataError, match="neither a file nor a folder"):
        prepare(tmp_path / "out", [str(tmp_path / "nowhere")], "bpe", 300)
    with pytest.raises(DataError, match=r"held_out=1\.5"):
        prepare(tmp_path / "out", [str(tmp_path)], "bpe", 300, held_out=1.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "junk"]


def test_two_characters_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    with pytest.raises(DataError, match="held-out part has"):
        prepare(tmp_path / "out", [str(tmp_path / "a.txt")], "char", None, 0.1, "tail")


def test_a_full_disk_is_a_clear_error(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", full)
        with pytest.raises(DataError, match=r"No space left on device.*goes on from there"):
            prepare(tmp_path / "out", [str(corpus)], "bpe", 300)
    said: list[str] = []
    prepare(tmp_path / "out", [str(corpus)], "bpe", 300, say=said.append)
    assert said[0] == "going on where it was stopped"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_rejects_are_in_the_manifest(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"record {i} " * 5}) for i in range(50)]
    (tmp_path / "d.jsonl").write_text("\n".join([*lines, "{broken"]))
    data = prepare(tmp_path / "out", [str(tmp_path / "d.jsonl")], "bpe", 300)
    assert data.manifest["rejects"]["counts"] == {"broken JSON": 1}
