"""The tokenizer: identity, determinism, the released layout, and text that spells control tokens."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data import Tokenizer
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


def test_equal_texts_give_equal_tokenizers_in_another_process_too(
    bpe: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "corpus.json").write_text(json.dumps(CORPUS))
    code = (
        "import json, sys; from fathom.data import Tokenizer;"
        "print(Tokenizer.train(json.load(open(sys.argv[1])), 400).fingerprint)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "corpus.json"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == bpe.fingerprint == Tokenizer.train(iter(CORPUS), 400).fingerprint


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
    for row in random.Random(0).sample(rows, min(len(rows), 400)):
        if "pieces" in row:
            assert pieces(row["text"]) == row["pieces"]
            assert released.encode(row["text"]) == row["ids"]
            assert released.decode(row["ids"]) == row["text"]
        else:
            before = [released.bos_id] if row["bos_prepended"] else []
            assert before + released.encode(row["text"], allow_special=True) == row["ids"]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    packed = shared_data("tokenizer/deepseek_v3_tokenizer.json.gz")
    folder = tmp_path_factory.mktemp("released")
    (folder / "tokenizer.json").write_bytes(gzip.decompress(packed.read_bytes()))
    return Tokenizer.load(folder)


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
