"""Opening prepared data: what is refused, what is remembered, and a run on a folder that was prepared before."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fathom.data import TokenData, Tokenizer, inspection, prepare
from fathom.errors import DataError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, prepared."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("en", "zh"):
        lines = [json.dumps({"text": f"{name} line {i} " * (1 + i % 9)}) + "\n" for i in range(90)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    sources = [f"{name}={folder / name}.jsonl" for name in ("en", "zh")]
    prepare(folder / "out", sources, "bpe", 300, held_out=0.2, weights={"en": 2, "zh": 1})
    return folder / "out"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.mark.parametrize("file", ["en/train-00000.bin", "zh/held_out-00000.npy"])
def test_a_damaged_shard_is_refused_with_the_reason(file: str, copy: Path) -> None:
    TokenData.open(copy)  # and is remembered as sound
    content = bytearray((copy / file).read_bytes())
    content[-1] ^= 1
    (copy / file).write_bytes(content)
    with pytest.raises(DataError, match=rf"{file} was altered since it was prepared"):
        TokenData.open(copy)
    (copy / file).write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"bytes instead of|was altered"):
        TokenData.open(copy)
    (copy / file).unlink()
    with pytest.raises(DataError, match=rf"{file} is missing"):
        TokenData.open(copy)


def test_a_verified_shard_is_not_hashed_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = hashlib.file_digest

    def watched(file, name):  # type: ignore[no-untyped-def]
        hashed.append(file.name)
        return real(file, name)

    monkeypatch.setattr(hashlib, "file_digest", watched)
    (copy / "verified.json").unlink()
    TokenData.open(copy)
    assert len(hashed) == 8
    TokenData.open(copy)
    assert len(hashed) == 8
    os.utime(copy / "en" / "train-00000.bin")
    TokenData.open(copy)
    assert len(hashed) == 9


def test_another_tokenizer_is_refused(copy: Path, tmp_path: Path) -> None:
    other = Tokenizer.train(["other text " * 50], 290)
    with pytest.raises(DataError, match=rf"asked for is {other.fingerprint[:12]}"):
        TokenData.open(copy, other.fingerprint)
    TokenData.open(copy, Tokenizer.load(copy).fingerprint)
    other.save(copy)
    with pytest.raises(DataError, match=r"tokenizer.json is not the one its tokens were made with"):
        TokenData.open(copy)


def test_a_prepared_folder_is_a_source(made: Path, tmp_path: Path) -> None:
    data = prepare(tmp_path / "run", [str(made)], "bpe", 512)
    first = TokenData.open(made)
    assert data.fingerprint == first.fingerprint and data.names == ("en", "zh")
    assert data.manifest["weights"] == {"en": 2, "zh": 1}
    noted = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert noted["tokens"]["train"] == len(data.train)
    for again in (prepare(tmp_path / "run", [str(made)]), TokenData.open(tmp_path / "run")):
        assert np.array_equal(np.asarray(again.train), np.asarray(first.train))


def test_a_folder_that_uses_another_speaks_for_it(copy: Path, tmp_path: Path) -> None:
    data = prepare(tmp_path / "run", [str(copy)], "bpe", 512)
    assert Tokenizer.load(tmp_path / "run").fingerprint == data.tokenizer.fingerprint
    again = prepare(tmp_path / "second", [str(tmp_path / "run")])
    assert again.fingerprint == data.fingerprint
    inspection.reject_summary(tmp_path / "second")
    with pytest.raises(DataError, match=r"run uses the prepared data in .*copy; give that"):
        prepare(tmp_path / "run", ["stdlib"])
    copy.rename(tmp_path / "moved")
    for gone in ("run", "second"):
        with pytest.raises(
            DataError, match=r"uses the prepared data in .*copy, where there is none now"
        ):
            TokenData.open(tmp_path / gone)


def test_what_a_prepared_folder_is_not_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 300 ids, the model's vocab_size is 299"):
        prepare(tmp_path / "run", [str(made)], "bpe", 299)
    with pytest.raises(DataError, match=r"prepared with dedup 'none', asked for is 'near'"):
        prepare(tmp_path / "run", [str(made)], dedup="near")
    with pytest.raises(DataError, match=r"prepared with fim_rate 0.0, asked for is 0.1"):
        prepare(tmp_path / "run", [str(made)], fim_rate=0.1)
    Tokenizer.train(["other text " * 50], 290).save(tmp_path / "t")
    with pytest.raises(DataError, match=r"was made with the tokenizer"):
        prepare(tmp_path / "run", [str(made)], str(tmp_path / "t"))
    with pytest.raises(DataError, match=r"no tokenizer at missing"):
        prepare(tmp_path / "run", [str(made)], "missing")
    with pytest.raises(DataError, match=r"prepared with tokenizer 'bpe', asked for is 'char'"):
        prepare(tmp_path / "run", [str(made)], "char")
    with pytest.raises(DataError, match=r"is prepared data, which cannot be prepared again"):
        prepare(tmp_path / "run", [str(made), "stdlib"])
    assert not (tmp_path / "run").exists()


def test_a_run_folder_with_data_of_its_own_is_not_turned_over(made: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some other text " * 40)
    prepare(tmp_path / "data", [str(tmp_path / "a.txt")], "bpe", 300)
    with pytest.raises(DataError, match="holds other prepared data"):
        prepare(tmp_path / "data", [str(made)])


def test_weights_are_checked_and_can_be_changed_without_making_anew(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some other text " * 40)
    source, out = str(tmp_path / "a.txt"), tmp_path / "out"
    with pytest.raises(DataError, match=r"weight b = 1 is of no source; there are a$"):
        prepare(out, [source], "bpe", 300, weights={"b": 1})
    with pytest.raises(DataError, match=r"weight a = -1"):
        prepare(out, [source], "bpe", 300, weights={"a": -1})
    with pytest.raises(DataError, match="all weights are 0"):
        prepare(out, [source], "bpe", 300, weights={"a": 0})
    assert prepare(out, [source], "bpe", 300).manifest["weights"] == {}
    said: list[str] = []
    again = prepare(out, [source], "bpe", 300, weights={"a": 2.0}, say=said.append)
    assert again.manifest["weights"] == {"a": 2.0} and not said
