"""The tokenizer inside a GGUF file: every token with its kind, merges, control tokens; others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fathom
from fathom.data import Tokenizer
from fathom.errors import DataError
from fathom.interop.gguf_vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED, read_vocabulary
from tests.interop.tiny import tiny_config, tiny_model

TEXTS = ["def function(argument):\n    return argument + 1\n", "一二三 1234 ---\n\n"] * 9
ROWS = 320


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def changed(tokenizer: Tokenizer, folder: Path, change: Any) -> Tokenizer:
    """The tokenizer with its tokenizer.json changed in place."""
    tokenizer.save(folder)
    file = folder / "tokenizer.json"
    definition = json.loads(file.read_text())
    change(definition)
    file.write_text(json.dumps(definition))
    return Tokenizer.load(folder)


def test_every_row_has_its_token(tokenizer: Tokenizer) -> None:
    found = read_vocabulary(tokenizer, tiny_config(vocab_size=ROWS))
    assert found.tokens[: tokenizer.vocab_size] == [tokenizer.spelling(i) for i in range(300)]
    assert found.tokens[300:] == [f"[PAD{i}]" for i in range(300, ROWS)]
    control = set(tokenizer._controls.values())
    assert {0, 1, 2, 299} < control
    expected = [CONTROL if i in control else NORMAL for i in range(300)] + [UNUSED] * 20
    assert found.kinds == expected
    ranks = [merge.split(" ") for merge in found.merges]
    assert ranks and all(len(pair) == 2 and "".join(pair) in found.tokens for pair in ranks)
    learned = sorted(found.tokens.index("".join(pair)) for pair in ranks)
    assert learned == list(range(3 + 256, 3 + 256 + len(ranks)))


def test_what_a_file_says_of_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from tests.interop.deepseek2_graph import File

    pytest.importorskip("gguf")
    model = tiny_model(tiny_config(vocab_size=ROWS, eos_token_id=17))
    fathom.save_gguf(model, tmp_path / "model.gguf", tokenizer)
    keys = File(tmp_path / "model.gguf").keys
    found = read_vocabulary(tokenizer, model.config)
    prefix = "tokenizer.ggml."
    said = {k.removeprefix(prefix): v for k, v in keys.items() if k.startswith(prefix)}
    assert said.pop("tokens") == found.tokens and said.pop("merges") == found.merges
    assert said.pop("token_type") == found.kinds
    assert said == {
        "model": "gpt2",
        "pre": "deepseek-v3",
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,  # the tokenizer's, not the configuration's
        "padding_token_id": 2,
    }
    assert keys["tokenizer.chat_template"] == tokenizer.settings["chat_template"]


def test_settings_that_name_no_tokens_leave_the_configuration(tokenizer: Tokenizer) -> None:
    bare = Tokenizer(
        tokenizer._definition, {"add_bos_token": True, "bos_token": {"content": "none such"}}
    )
    keys = read_vocabulary(bare, tiny_config(vocab_size=300, bos_token_id=5)).keys
    assert keys["tokenizer.ggml.bos_token_id"] == 5 and keys["tokenizer.ggml.add_bos_token"]
    assert "tokenizer.chat_template" not in keys
    assert "tokenizer.ggml.padding_token_id" not in keys


def test_added_tokens_that_abbreviate_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def add(definition: dict[str, Any]) -> None:
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for i, content in ((300, "<｜Tool｜>"), (301, "->")):
            definition["added_tokens"].append(
                {"id": i, "content": content, "special": False} | plain
            )

    found = read_vocabulary(changed(tokenizer, tmp_path, add), tiny_config(vocab_size=302))
    assert found.tokens[300:] == ["<｜Tool｜>", "->"] and found.kinds[300:] == [
        CONTROL,
        USER_DEFINED,
    ]


def without_first_pass(definition: dict[str, Any]) -> None:
    del definition["pre_tokenizer"]["pretokenizers"][0]


def other_pattern(definition: dict[str, Any]) -> None:
    definition["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\p{N}{1,4}"}


def joined_pass(definition: dict[str, Any]) -> None:
    definition["pre_tokenizer"]["pretokenizers"][1]["behavior"] = "MergedWithNext"


def prefix_space(definition: dict[str, Any]) -> None:
    definition["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True


def normalizing(definition: dict[str, Any]) -> None:
    definition["normalizer"] = {"type": "NFC"}


def whole_words(definition: dict[str, Any]) -> None:
    definition["model"]["ignore_merges"] = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_first_pass, "does not cut"),
        (other_pattern, "does not cut"),
        (joined_pass, "does not cut"),
        (prefix_space, "does not cut"),
        (normalizing, "normalises"),
        (whole_words, "ignore_merges"),
    ],
)
def test_another_way_to_read_texts_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, change: Any, reason: str
) -> None:
    other = changed(tokenizer, tmp_path, change)
    with pytest.raises(DataError, match=reason):
        read_vocabulary(other, tiny_config(vocab_size=ROWS))


def test_characters_and_too_many_ids_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"WordLevel, not BPE.*save_gguf"):
        read_vocabulary(Tokenizer.train(TEXTS, None, "char"), tiny_config())
    with pytest.raises(DataError, match=r"up to 299 .*vocab_size=257"):
        read_vocabulary(tokenizer, tiny_config())
