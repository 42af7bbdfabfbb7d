"""A tokenizer as llama.cpp keeps it inside a GGUF file: tokens with their kinds, merges, control tokens, chat template.

llama.cpp knows ways to cut a text by name only. Ours is the released one, `deepseek-v3`; a tokenizer that cuts or
merges in another way is refused, because its texts would become other tokens without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fathom.errors import DataError
from fathom.interop.gguf_keys import Value
from fathom.interop.writing import SavesItself
from fathom.model.config import ModelConfig

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""llama.cpp's kinds of token."""
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
    (
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
        "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
)
"""The passes that llama.cpp cuts a text in under this name; the same ones are in the released tokenizer.json."""
_ROLES = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}


@dataclass(frozen=True)
class Vocabulary:
    """What a file holds under `tokenizer.`."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    keys: dict[str, Value]
    """All that is no list."""


def read_vocabulary(tokenizer: SavesItself, config: ModelConfig) -> Vocabulary:
    """The vocabulary for a model of `config.vocab_size` rows; rows beyond the tokenizer's ids count as unused.

    Raises `DataError` for a tokenizer that llama.cpp would not follow, or that has more ids than the model has rows.
    """
    with TemporaryDirectory() as folder:
        tokenizer.save(Path(folder), config.max_position_embeddings)
        definition = _read(Path(folder) / "tokenizer.json")
        settings = _read(Path(folder) / "tokenizer_config.json")
    if reasons := list(_obstacles(definition)):
        raise DataError(
            f"llama.cpp would read texts otherwise than this tokenizer ({'; '.join(reasons)}); use a byte-level BPE "
            f"with the released cuts, or write the weights alone: fathom.save_gguf(model, file)"
        )
    added = {token["id"]: token for token in definition.get("added_tokens") or []}
    ids = definition["model"]["vocab"] | {token["content"]: i for i, token in added.items()}
    tokens, kinds = _rows(ids, added, config.vocab_size)
    merges = [_merge(pair) for pair in definition["model"]["merges"]]
    return Vocabulary(tokens, kinds, merges, _keys(ids, settings, config))


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _obstacles(definition: Mapping[str, Any]) -> Iterator[str]:
    """In what a tokenizer.json differs from what llama.cpp does for `deepseek-v3`."""
    model = definition["model"]
    if model["type"] != "BPE":
        yield f"its model is {model['type']}, not BPE"
        return
    if definition.get("normalizer") is not None:
        yield "it normalises text"
    if tuple(_cuts(definition)) != _DEEPSEEK_V3:
        yield "it does not cut text like the released one"
    odd = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    if set_ones := [name for name in odd if model.get(name)]:
        yield f"its model has {', '.join(set_ones)}"


def _cuts(definition: Mapping[str, Any]) -> Iterator[str]:
    """The patterns of its passes, as long as all isolate and bytes follow; else something no pattern equals."""
    whole = definition.get("pre_tokenizer") or {}
    *splits, last = whole.get("pretokenizers") or [{}]
    plain = {"add_prefix_space": False, "use_regex": False}
    if last.get("type") != "ByteLevel" or any(last.get(key) != no for key, no in plain.items()):
        yield "no bytes"
    for part in splits:
        isolates = part.get("behavior") == "Isolated" and not part.get("invert")
        yield part["pattern"].get("Regex", "") if part["type"] == "Split" and isolates else ""


def _rows(
    ids: Mapping[str, int], added: Mapping[int, Mapping[str, Any]], rows: int
) -> tuple[list[str], list[int]]:
    """Spelling and kind of every row of the embedding."""
    if (most := max(ids.values()) + 1) > rows:
        raise DataError(
            f"the tokenizer has ids up to {most - 1} but the model has vocab_size={rows}; use the tokenizer that the "
            f"model was trained with"
        )
    tokens = [f"[PAD{row}]" for row in range(rows)]
    kinds = [UNUSED] * rows
    for spelling, i in ids.items():
        tokens[i], kinds[i] = spelling, _kind(added.get(i))
    return tokens, kinds


def _kind(added: Mapping[str, Any] | None) -> int:
    """CONTROL for tokens that steer the model, which the released file does not always mark (`<｜User｜>`)."""
    if added is None:
        return NORMAL
    steers = added["special"] or re.fullmatch("<.+>", added["content"])
    return CONTROL if steers else USER_DEFINED


def _merge(pair: str | list[str]) -> str:
    """Both spellings of a merge as one text; bytes are spelled without blanks."""
    return pair if isinstance(pair, str) else " ".join(pair)


def _keys(
    ids: Mapping[str, int], settings: Mapping[str, Any], config: ModelConfig
) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "ggml.model": "gpt2",  # byte-level BPE
        "ggml.pre": "deepseek-v3",
        "ggml.add_bos_token": bool(settings.get("add_bos_token")),
        "ggml.add_eos_token": bool(settings.get("add_eos_token")),
        "ggml.bos_token_id": config.bos_token_id,
        "ggml.eos_token_id": config.eos_token_id,
    }
    for role, key in _ROLES.items():
        value = settings.get(role)
        spelling = value["content"] if isinstance(value, dict) else value
        if isinstance(spelling, str) and spelling in ids:
            keys[f"ggml.{key}"] = ids[spelling]
    if isinstance(template := settings.get("chat_template"), str):
        keys["chat_template"] = template
    return {f"tokenizer.{key}": value for key, value in keys.items()}
