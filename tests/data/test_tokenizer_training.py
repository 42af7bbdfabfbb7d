"""Training from sources: what is said on the way, a part of too much text, what cannot be learned from."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from fathom.data import Tokenizer
from fathom.data.progress import TrainingProgress, reading_line
from fathom.data.tokenizer_training import bytes_per_token, part_of, train_on
from fathom.errors import DataError

TEXTS = [f"document {i}: the year {i * 7} has {i % 13} moons.\n" for i in range(300)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "texts.jsonl").write_text("\n".join([*lines, "{broken"]))
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    return tmp_path


def test_what_was_found_is_said_and_rejects_are_counted(folder: Path) -> None:
    said: list[str] = []
    trained = train_on([str(folder)], 400, said.append)
    size = len("".join(TEXTS).encode())
    assert (trained.documents, trained.bytes, trained.rejects.total) == (300, size, 2)
    assert "300 documents" in said[0] and "1 not UTF-8 text" in said[0]
    assert said[1].endswith("all read; merging")
    assert trained.tokenizer.fingerprint == Tokenizer.train(TEXTS, 400).fingerprint
    count = sum(len(trained.tokenizer.encode(text)) for text in TEXTS)
    assert trained.bytes_per_token == pytest.approx(size / count)


def test_of_too_much_text_a_part_that_depends_on_the_documents_alone(folder: Path) -> None:
    said: list[str] = []
    size = len("".join(TEXTS).encode())
    part = list(part_of(TEXTS, size, size // 3, said.append))
    assert 70 < len(part) < 130 and "documents taken by hash" in said[0]
    assert sorted(part_of(TEXTS[::-1], size, size // 3, said.append)) == sorted(part)
    assert list(part_of(TEXTS, size, size, said.append)) == TEXTS and len(said) == 2
    trained = train_on([str(folder)], 400, said.append, read_at_most=size // 3)
    assert trained.tokenizer.fingerprint == Tokenizer.train(part, 400).fingerprint


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match="1 not UTF-8 text"):
        train_on([str(tmp_path)], 400, print)


def test_bytes_per_token_of_many_batches_and_of_none() -> None:
    tokenizer = Tokenizer.train(TEXTS, 400)
    count = sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert bytes_per_token(tokenizer, TEXTS) == len("".join(TEXTS)) / count
    assert bytes_per_token(tokenizer, []) != bytes_per_token(tokenizer, [])


def test_progress_tells_both_phases() -> None:
    said: list[str] = []
    with TrainingProgress(said.append, total_bytes=400, every=0.01) as progress:
        texts = []
        for text in progress.reading(["ab" * 50, "é" * 50]):
            texts.append(text)
            time.sleep(0.02)
        while not any(line.startswith("merging for") for line in said):
            time.sleep(0.01)
    count = len(said)
    time.sleep(0.03)
    assert texts == ["ab" * 50, "é" * 50] and len(said) == count, "silent once it is over"
    assert "left" in said[0] and said[2].endswith("all read; merging")


def test_the_line_gives_rate_and_time_left() -> None:
    line = reading_line(25_000_000, 10.0, 100_000_000)
    assert line == "counted the pieces of 25.0 MB, 2.5 MB/s, 30 s left"
    assert "left" not in reading_line(25_000_000, 10.0, None)


def test_an_error_while_reading_ends_the_training_with_that_error() -> None:
    def failing():
        yield "text"
        raise DataError("the disk is gone")

    with pytest.raises(DataError, match="the disk is gone"):
        Tokenizer.train(failing(), 400, say=print)
