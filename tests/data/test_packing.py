"""Every document's tokens exactly once, end-of-sentence after each, the order and the index as promised."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data import Tokenizer, prepare
from fathom.data.pipeline import making, packing
from fathom.data.pipeline.encoding import ENTRY, _write
from fathom.data.pipeline.packing import buckets, pack_bucket, read_record
from fathom.data.pipeline.work import finishing
from fathom.errors import DataError

DOCUMENTS = st.lists(
    st.tuples(st.integers(0, 2**64 - 1), st.lists(st.integers(2, 60_000), max_size=9)),
    min_size=1,
    max_size=40,
)


@given(
    documents=DOCUMENTS,
    stretches=st.integers(1, 4),
    size=st.sampled_from([1, 40, 10_000]),
    end_last=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_packing_is_a_stable_sort_by_hash(
    documents: list, stretches: int, size: int, end_last: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("pack")
    pieces = []
    for i in range(stretches):
        pieces.append(folder / f"{i}")
        found = [
            (np.array([*ids, 1], np.uint16), (0, 2 * len(ids), key, i, n))
            for n, (key, ids) in enumerate(documents[i::stretches])
        ]
        with finishing(pieces[-1]) as out:
            _write(out, "train", found, np.dtype("<u2"))
    shards, indices = [], []
    for k, bucket in enumerate(buckets("train", pieces, size)):
        place = folder / f"packed{k}"
        pack_bucket(bucket, pieces, "<u2", end_last, "x", place)
        shards.append(np.fromfile(place / "x.bin", "<u2"))
        indices.append(np.load(place / "x.npy"))
        record = read_record(place)
        assert (record.tokens, record.documents) == (len(shards[-1]), len(indices[-1]))
    in_order = [pair for i in range(stretches) for pair in documents[i::stretches]]
    wanted = [ids for _, ids in sorted(in_order, key=lambda pair: pair[0])]
    stream = [token for ids in wanted for token in (*ids, 1)]
    assert np.concatenate(shards).tolist() == (stream if end_last else stream[:-1])
    found = [_document(s, x, n) for s, x in zip(shards, indices, strict=True) for n in range(len(x))]  # fmt: skip
    assert found == wanted
    assert np.concatenate(indices)["bytes"].tolist() == [2 * len(ids) for ids in wanted]


def _document(tokens: np.ndarray, index: np.ndarray, n: int) -> list[int]:
    """What the index says document n is, without its end."""
    stop = index["start"][n + 1] if n + 1 < len(index) else len(tokens)
    ids = tokens[index["start"][n] : stop].tolist()
    return ids[:-1] if ids and ids[-1] == 1 else ids


def test_one_source_gives_the_stream_it_always_gave(tmp_path: Path) -> None:
    """Against a few lines of our own: documents by ascending hash, end-of-sentence after each."""
    texts = [f"text {i} " * (1 + i % 7) for i in range(150)] + ["twice the same"] * 2
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    data = prepare(tmp_path / "out", [str(tmp_path / "d.jsonl")], "bpe", 350, held_out=0.2, seed=5)

    def halves(text: str) -> tuple[int, int]:
        digest = blake2b(text.encode(), digest_size=16, key=b"5").digest()
        return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")

    tokenizer = Tokenizer.load(tmp_path / "out")
    for side, tokens in (("train", data.train), ("held_out", data.held_out)):
        chosen = [t for t in texts if (halves(t)[0] < 0.2 * 2**64) == (side == "held_out")]
        chosen.sort(key=lambda text: halves(text)[1])
        wanted = [i for text in chosen for i in (*tokenizer.encode(text), tokenizer.eos_id)]
        assert np.asarray(tokens).tolist() == wanted
        lengths = [len(tokenizer.encode(text)) + 1 for text in chosen]
        assert np.diff(tokens.documents).tolist() == lengths
    assert tokenizer.fingerprint == Tokenizer.train(
        (t for t in texts if halves(t)[0] >= 0.2 * 2**64), 350
    ).fingerprint  # fmt: skip


def test_many_shards_read_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{i} squared is {i * i}, " * (1 + i % 5) for i in range(200)]
    for name, some in (("a", texts[:150]), ("b", texts[150:])):
        lines = "".join(json.dumps({"text": t}) + "\n" for t in some)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    sources = [str(tmp_path / "a.jsonl"), f"second={tmp_path / 'b.jsonl'}"]
    whole = prepare(tmp_path / "whole", sources, "bpe", 300, held_out=0.2)
    monkeypatch.setattr(packing.buckets, "__defaults__", (600,))
    monkeypatch.setattr(making, "STRETCH_BYTES", 700)
    cut = prepare(tmp_path / "cut", sources, "bpe", 300, held_out=0.2)
    assert len(list((tmp_path / "cut" / "a").glob("train-*.bin"))) > 4
    assert cut.names == ("a", "second")
    random = np.random.default_rng(0)
    for side in ("train", "held_out"):
        for source in (None, "a", "second"):
            one, other = whole.tokens(side, source), cut.tokens(side, source)
            array = np.asarray(one)
            assert np.array_equal(array, np.asarray(other)) and len(one) == len(other) == len(array)
            assert np.array_equal(one.documents, other.documents)
            for start, stop in np.sort(random.integers(0, len(one) + 1, (20, 2))).tolist():
                assert np.array_equal(other.read(start, stop), array[start:stop])
            at = random.integers(0, len(one), (5, 7))
            assert np.array_equal(other[at], array[at])
            assert np.array_equal(other[3:-5:2], array[3:-5:2])
            with pytest.raises(DataError, match=f"of {len(one)}"):
                other.read(0, len(one) + 1)
            with pytest.raises(DataError, match=f"of {len(one)} tokens"):
                other[np.array([-1])]
    joined = np.concatenate([np.asarray(whole.tokens("train", name)) for name in whole.names])
    assert np.array_equal(np.asarray(cut.train), joined)
    assert whole.bytes_per_token("train") == cut.bytes_per_token("train")


def test_the_index_leads_back_to_the_source(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    texts = {f"{i:02}.txt": f"file number {i} " * 4 for i in range(30)}
    for name, text in texts.items():
        (folder / name).write_text(text)
    lines = [f"line number {i} " * 4 for i in range(30)]
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    data = prepare(tmp_path / "out", [str(folder)], "bpe", 300, held_out=0.2)
    names = json.loads((tmp_path / "out" / "files.json").read_text())["folder"]
    tokens = data.train
    for i, (start, stop) in enumerate(zip(tokens.documents, tokens.documents[1:], strict=False)):
        text = data.tokenizer.decode(tokens.read(start, stop - 1).tolist())
        entry = tokens.entry(i)
        name = names[entry["file"]]
        assert text == (lines[entry["row"] - 1] if name == "x.jsonl" else texts[name])
        assert entry["bytes"] == len(text) and entry.dtype == ENTRY
    with pytest.raises(DataError, match="is not one"):
        tokens.entry(len(tokens.documents) - 1)
