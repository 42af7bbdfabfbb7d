"""What a `tokenizer.json` says (report §4.1), and the few things that must not hold for us.

Files of all makers are read, by the library they were written with. Three of their habits are undone: random dropping
of merges, cutting and padding to a length, and letting plain text become a control token. The last happens even where
the library is told not to look for control tokens, when a control token is also an ordinary entry of a vocabulary that
is searched by spelling (Unigram files hold "</s>" as a piece). There the spelling is cut behind its first character
before the vocabulary sees it, which no other text notices.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fathom.errors import DataError


def control_tokens(definition: str) -> dict[str, int]:
    """Added tokens that steer a model rather than abbreviate text: marked special, or spelled <...>.

    The released file does not mark its role tokens as special, so the mark alone is not enough.
    """
    added = json.loads(definition).get("added_tokens") or []
    return {
        t["content"]: t["id"] for t in added if t["special"] or re.fullmatch("<.+>", t["content"])
    }


def reading_controls(definition: str, controls: Mapping[str, int]) -> Backend:
    """The tokenizer with every control token marked special, so that all are read or none; here all are."""
    content: dict[str, Any] = json.loads(definition)
    for token in content.get("added_tokens") or []:
        token["special"] = token["content"] in controls
    content["truncation"] = content["padding"] = None
    if content["model"].get("dropout"):
        content["model"]["dropout"] = None
    return Backend.from_str(json.dumps(content))


def reading_text(definition: str, controls: Mapping[str, int]) -> Backend:
    """The tokenizer that takes all text for text: control tokens are the characters they are spelled with.

    Raises `DataError` for a file in which that cannot be had.
    """
    backend = reading_controls(definition, controls)
    backend.encode_special_tokens = True
    entries = _entries(json.loads(definition)["model"])
    found_by_model = {spelling: i for spelling, i in controls.items() if spelling in entries}
    leaking = _leaking(backend, found_by_model)
    if leaking:
        _cut_spellings(backend, leaking)
    if still := _leaking(backend, found_by_model):
        raise DataError(
            f"the tokenizer takes text that spells {still[0]!r} for its control token and cannot be kept from it; "
            f"use one whose control tokens are not part of the vocabulary that text is looked up in"
        )
    return backend


def _entries(model: Mapping[str, Any]) -> set[str]:
    """The vocabulary that text is looked up in, without the token for what it lacks: that one, text may well become."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pieces with scores
        return {piece for i, (piece, _) in enumerate(vocabulary) if i != model.get("unk_id")}
    return set(vocabulary) - {model.get("unk_token")}


def _leaking(backend: Backend, controls: Mapping[str, int]) -> list[str]:
    """Control tokens that their spelling, alone or behind a blank or a letter, is encoded as."""
    found = []
    for before in ("", " ", "a"):
        encodings = _encoded(backend, [before + spelling for spelling in controls])
        pairs = zip(controls.items(), encodings, strict=True)
        found += [spelling for (spelling, i), ids in pairs if i in ids]
    return list(dict.fromkeys(found))


def _encoded(backend: Backend, texts: list[str]) -> list[list[int]]:
    """Ids of each text; none for those that hold a character which the tokenizer does not know."""
    try:
        found = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]
    except Exception:  # the Rust side raises bare Exception
        return [[]] if len(texts) == 1 else [ids for t in texts for ids in _encoded(backend, [t])]


def _cut_spellings(backend: Backend, spellings: list[str]) -> None:
    """One more pass of pre-tokenisation, which cuts these spellings behind their first character."""
    before = backend.pre_tokenizer
    patterns = [re.escape(s[0]) + f"(?={re.escape(s[1:])})" for s in spellings if len(s) > 1]
    cut = pre_tokenizers.Split(Regex("|".join(patterns)), behavior="merged_with_previous")
    backend.pre_tokenizer = pre_tokenizers.Sequence([before, cut] if before else [cut])
