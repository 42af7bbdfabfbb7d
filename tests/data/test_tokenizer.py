"""The tokenizer: identity, determinism, the released layout, and text that spells control tokens."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from hashlib import sha256
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data import Tokenizer, vocabulary
from fathom.data.vocabulary import BOS, EOS, EOT, PLACEHOLDER, pieces, stretches
from fathom.errors import DataError
from tests.shared_data import shared_data

CORPUS = [
    "def greet(name):\n    return f'Hello, {name}!'\n" * 30,
    "The latent cache holds 576 numbers; the year 2024 has 366 days.\n" * 30,
    "今天天气很好。東京タワー、ひらがな。Привет, мир!\n" * 20,
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
SPELLED = st.sampled_from(
    [BOS, EOS, EOT, "<｜User｜>", PLACEHOLDER.format(0), "▁", "｜", "\n\n", " 12345"]
)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train(CORPUS, 400)


def test_released_layout(bpe: Tokenizer) -> None:
    assert bpe.vocab_size == 400
    assert (bpe.bos_id, bpe.eos_id, bpe.control_id("<｜▁pad▁｜>")) == (0, 1, 2)
    last = [
        "<｜fim▁hole｜>",
        "<｜fim▁begin｜>",
        "<｜fim▁end｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<|EOT|>",
    ]
    assert [bpe.control_id(token) for token in last] == list(range(394, 400))
    assert [bpe.encode(chr(c))[0] for c in range(ord("!"), ord("~"))] == list(
        range(3, 3 + ord("~") - ord("!"))
    )


@pytest.fixture(scope="module")
def whole() -> Tokenizer:
    """As many ids as the released embedding has rows."""
    return Tokenizer.train(CORPUS, 129_280)


def test_from_the_released_size_on_every_id_is_the_released_one(whole: Tokenizer) -> None:
    """Merges that a small corpus lacks are place holders, and so are the ids behind the last token for tools."""
    golden = {"fim▁hole": 128_800, "fim▁begin": 128_801, "fim▁end": 128_802, "User": 128_803}
    golden |= {"Assistant": 128_804, "tool▁calls▁begin": 128_806, "tool▁sep": 128_814}
    assert {name: whole.control_id(f"<｜{name}｜>") for name in golden} == golden
    assert whole.control_id(EOT) == 128_805 and (whole.bos_id, whole.eos_id) == (0, 1)
    assert whole.vocab_size == 129_280 and whole.control_id(PLACEHOLDER.format(0)) < 128_000
    assert whole.control_id(PLACEHOLDER.format(whole.placeholders - 1)) == 129_279
    assert whole.encode("def greet") == Tokenizer.train(CORPUS, 2000).encode("def greet")


def test_ids_of_the_released_file(whole: Tokenizer, released: Tokenizer) -> None:
    assert released.vocab_size == vocabulary.RELEASED_SIZE == 128_815
    assert released.placeholders == 800 and released.control_id(PLACEHOLDER.format(799)) == 128_799
    shared = [*range(259), *range(vocabulary.RELEASED_CONTROL, vocabulary.RELEASED_SIZE)]
    assert [whole.spelling(i) for i in shared] == [released.spelling(i) for i in shared]


@given(st.lists(st.one_of(TEXT, SPELLED), max_size=8).map("".join))
@settings(max_examples=200, deadline=None)
def test_decode_of_encode_is_the_text_and_text_never_becomes_control(text: str) -> None:
    tokenizer = _shared_bpe()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2, *range(394, 400)} & set(ids)
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text


@given(st.lists(st.integers(0, 399), max_size=30))
@settings(max_examples=100, deadline=None)
def test_stream_of_any_ids_is_their_decoding(ids: list[int]) -> None:
    stream = _shared_bpe().stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == _shared_bpe().decode(ids)


def _shared_bpe(made: list[Tokenizer] = []) -> Tokenizer:  # noqa: B006 (one for all examples)
    if not made:
        made.append(Tokenizer.train(CORPUS, 400))
    return made[0]


def test_stream_holds_back_half_a_character(bpe: Tokenizer) -> None:
    stream = bpe.stream()
    pushed = [stream.push(token) for token in bpe.encode("🦑")]
    assert pushed == [""] * (len(pushed) - 1) + ["🦑"] and len(pushed) == 4
    stream.push(bpe.encode("🦑")[0])
    assert stream.flush() == "\ufffd"


def test_control_tokens_only_when_allowed(bpe: Tokenizer) -> None:
    text = f"a{EOS}b<|EOT|>"
    assert bpe.encode(text, allow_special=True) == [*bpe.encode("a"), 1, *bpe.encode("b"), 399]
    assert 1 not in bpe.encode(text)


def test_equal_texts_give_equal_tokenizers_for_any_number_of_threads(
    bpe: Tokenizer, tmp_path: Path
) -> None:
    """Here with as many as there are cores, in another process with another number and other hashes."""
    assert bpe.fingerprint == Tokenizer.train(iter(CORPUS), 400).fingerprint
    (tmp_path / "corpus.json").write_text(json.dumps(CORPUS))
    code = (
        "import json, sys; from fathom.data import Tokenizer;"
        "print(Tokenizer.train(json.load(open(sys.argv[1])), 400).fingerprint)"
    )
    threads = "1" if (os.cpu_count() or 1) > 1 else "3"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "corpus.json"],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == bpe.fingerprint


def test_a_corpus_too_small_is_filled_with_place_holders(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["aaab aaab"], 1000)
    assert tokenizer.vocab_size == 1000 and tokenizer.control_id(EOT) == 999
    assert 700 < tokenizer.placeholders < 735
    assert tokenizer.decode(tokenizer.encode("aaab")) == "aaab"


def test_sizes_that_cannot_be() -> None:
    assert Tokenizer.train([], 265).vocab_size == 265
    with pytest.raises(DataError, match="vocab_size=264"):
        Tokenizer.train([], 264)
    with pytest.raises(DataError, match="set vocab_size=5"):
        Tokenizer.train(["abc"], 4, kind="char")
    with pytest.raises(DataError, match="kind='words'"):
        Tokenizer.train(["abc"], 400, kind="words")


def test_characters(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["hello\n", "wörld"], None, kind="char")
    assert tokenizer.vocab_size == len(set("hello\nwörld")) + 2 and tokenizer.placeholders == 0
    assert tokenizer.encode("\n") == [2] and (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.decode(tokenizer.encode("ö\nhello")) == "ö\nhello"
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode("low\n") == tokenizer.encode("low\n")
    with pytest.raises(DataError, match="'xyz'"):
        tokenizer.encode("lxyzo")
    assert Tokenizer.train(["abc"], 9, kind="char").vocab_size == 9


def test_lone_surrogate_is_refused(bpe: Tokenizer) -> None:
    with pytest.raises(DataError, match="surrogate"):
        bpe.encode("a\ud800")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x1234567", ["x", "123", "456", "7"]),
        ("get_name(self.x)", ["get", "_name", "(self", ".x", ")"]),
        ("it's here", ["it", "'s", " here"]),
        ("a  b", ["a", " ", " b"]),
        ("if x:\n    y = 1\n\n", ["if", " x", ":\n", "   ", " y", " =", " ", "1", "\n\n"]),
        ("end.\n\nNext", ["end", ".\n\n", "Next"]),
        ("我在apple工作3天", ["我在", "apple", "工作", "3", "天"]),
        ("カタカナひらがな漢字 x", ["カタカナひらがな漢字", " x"]),
        ("été naïve", ["été", " naïve"]),
        ("tab\tword", ["tab", "\tword"]),
        ("x   ", ["x", "   "]),
        ("a \n \n b", ["a", " \n \n", " b"]),
        ("// --->", ["//", " --->"]),
        ("½٣", ["½٣"]),
        ("3.14159", ["3", ".", "141", "59"]),
        ("f(x);\r\n\r\ny", ["f", "(x", ");\r\n\r\n", "y"]),
        ("#!/bin/sh", ["#!/", "bin", "/sh"]),
        ("他说：“好。”\n\n下", ["他说", "：“", "好", "。”\n\n", "下"]),
        ("한국어 ไทย", ["한국어", " ไทย"]),
        ("\u3000全角", ["\u3000", "全角"]),
        ("e\u0301t", ["e\u0301t"]),
        ("🦑🦑\n", ["🦑🦑\n"]),
        ("\u200bx", ["\u200bx"]),
    ],
)
def test_pieces(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected


@given(st.lists(st.one_of(TEXT, SPELLED), max_size=20).map("".join), st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_stretches_cut_where_pieces_do(text: str, size: int) -> None:
    parts = list(stretches(text, size))
    assert "".join(parts) == text
    assert [p for part in parts for p in pieces(part)] == pieces(text)


def test_save_and_load(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "t", model_max_length=128)
    for path in (tmp_path / "t", tmp_path / "t" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == bpe.fingerprint and loaded.settings["model_max_length"] == 128
        assert not loaded.taught_to_chat
        assert loaded.settings["chat_template"] == (tmp_path / "t/chat_template.jinja").read_text()
    with pytest.raises(DataError, match="no tokenizer at"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_prompt_ids_follow_the_settings(bpe: Tokenizer) -> None:
    assert bpe.prompt_ids("def") == bpe.encode("def") and bpe.prompt_ids("") == [1]
    with_bos = Tokenizer(bpe._definition, {**bpe.settings, "add_bos_token": True})
    assert with_bos.prompt_ids("def") == [0, *bpe.encode("def")] and with_bos.prompt_ids("") == [0]


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_transformers_reads_what_is_saved(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.train(CORPUS, 400 if kind == "bpe" else None, kind)
    ours.save(tmp_path, model_max_length=99)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (
        isinstance(theirs, transformers.PreTrainedTokenizerFast) and theirs.model_max_length == 99
    )
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (0, 1, ours.vocab_size)
    text = CORPUS[2][:40] + CORPUS[0][:60] + "\n\n"
    assert theirs(text).input_ids == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text


@pytest.mark.parametrize(
    "name", ["deepseek_v3_vectors_dev.jsonl", "deepseek_v3_outside_vectors.jsonl"]
)
def test_the_released_tokenizer(name: str, released: Tokenizer) -> None:
    rows = [json.loads(line) for line in shared_data(f"tokenizer/{name}").read_text().splitlines()]
    assert len(rows) > 10
    for row in rows:
        if "pieces" in row:
            assert pieces(row["text"]) == row["pieces"]
            assert released.encode(row["text"]) == row["ids"]
            assert released.decode(row["ids"]) == row["text"]
        else:
            before = [released.bos_id] if row["bos_prepended"] else []
            assert before + released.encode(row["text"], allow_special=True) == row["ids"]


@pytest.mark.parametrize("number", range(7))
def test_whole_files_with_the_released_tokenizer(number: int, released: Tokenizer) -> None:
    """Counts and a hash of all ids; the text is given in parts, which must not matter."""
    check = json.loads(shared_data("tokenizer/deepseek_v3_corpus_checks.json").read_text())[number]
    text = _checked_text(check)
    if len(text.encode()) != check["bytes"]:
        pytest.skip(f"{check['file']} at hand is only a part of the file that was checked")
    parts = list(released.stretches(text, 50_000))
    assert len(parts) > len(text) // 100_000
    ids = [i for part in released.encode_batch(parts) for i in part]
    assert len(ids) == check["tokens"]
    assert sha256(",".join(map(str, ids)).encode()).hexdigest() == check["ids_sha256"]


def _checked_text(check: dict) -> str:
    path = shared_data(check["file"])
    if "rule" not in check:
        return path.read_bytes().decode()
    with gzip.open(path, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in islice(file, 40)]
    return "\n".join(texts)[:1_500_000]


@given(st.lists(st.one_of(TEXT, SPELLED), max_size=8).map("".join))
@settings(max_examples=100, deadline=None)
def test_identity_of_the_released_tokenizer(released: Tokenizer, text: str) -> None:
    ids = released.encode(text)
    assert released.decode(ids) == text and all(2 < i < 128_000 for i in ids)
    assert [i for _, part in released.pieces(text) for i in part] == ids
    assert "".join(piece for piece, _ in released.pieces(text)) == text


def test_golden_chats(released: Tokenizer) -> None:
    from fathom.data.chat import chat_ids

    rows = _golden_chats()
    assert len(rows) > 15
    for row in rows:
        ids = chat_ids(released, row["messages"], row["add_generation_prompt"])
        if row["name"] == "special_text":  # what others encode as control tokens stays text with us
            assert released.decode(ids) == row["rendered"] and ids != row["ids"]
            assert ids.count(released.eos_id) == 0
        else:
            assert ids == row["ids"]


def test_golden_chat_template() -> None:
    jinja2 = pytest.importorskip("jinja2")
    from fathom.data.chat import CHAT_TEMPLATE

    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
    for row in _golden_chats():
        values = {
            "bos_token": BOS,
            "eos_token": EOS,
            "add_generation_prompt": row["add_generation_prompt"],
        }
        assert template.render(messages=row["messages"], **values) == row["rendered"]


def _golden_chats() -> list[dict]:
    """The released V3 template's renderings of conversations without tools."""
    lines = shared_data("tokenizer/chat_template_golden.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["template"] == "deepseek-ai-DeepSeek-V3"]
    return [
        row
        for row in rows
        if {m["role"] for m in row["messages"]} <= {"system", "user", "assistant"}
    ]
