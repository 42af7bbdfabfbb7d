"""A small model and tokenizer to answer in forms, and what a state of a form allows."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import fathom
from fathom.data import Tokenizer
from fathom.inference import Engine, Guide, Output, Sampling
from fathom.inference.guided import Grammars, Guided
from tests.model.tiny import tiny_model

TEXTS = [
    '{"name":"ada","age":36,"tags":["x","yz"],"ok":true} {"name": "bob", "age": 7}',
    "<think> alpha, then beta </think> yes no abc ccc alter gamma",
] * 20
WORDS, ROWS = 320, 340
"""Tokens of the tokenizer and rows of the model, which has some that the tokenizer does not know."""
PERSON = {
    "type": "object",
    "properties": {
        "name": {"enum": ["ada", "bob", "日本"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "ok"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
CHOICE = "alpha|alter|beta|gamma"


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, WORDS)


@cache
def model(seed: int = 0) -> fathom.Transformer:
    return tiny_model(seed, vocab_size=ROWS, num_nextn_predict_layers=2).eval()


def engine(seed: int = 0, **settings: Any) -> Engine:
    return Engine(model(seed), tokenizer(), always_speculate=True, **settings)


def ask(guide: Guide, prompt: Any = "yes", seed: int = 1, **wishes: Any) -> Output:
    wish = Sampling(**{"temperature": 1.0, "max_new_tokens": 60, **wishes}, seed=seed, guide=guide)
    return next(engine().generate([prompt], wish))


def is_person(text: str | None) -> bool:
    found = json.loads(text or "")
    tags = found["tags"]
    return (
        list(found) == ["name", "age", "tags", "ok"]
        and found["name"] in ("ada", "bob", "日本")
        and isinstance(found["age"], int)
        and 0 <= found["age"] <= 150
        and len(tags) <= 2
        and all(isinstance(tag, str) and len(tag) <= 3 for tag in tags)
        and isinstance(found["ok"], bool)
    )


def continues(text: str, words: list[str]) -> bool:
    return any(word.startswith(text) for word in words)


def guided(guide: Guide, prompt: str = "yes", ends: tuple[int, ...] = (1,)) -> Guided:
    grammars = Grammars(tokenizer(), ROWS)
    return grammars.begin(guide, tokenizer().encode(prompt), frozenset(ends))[0]


def allowed(state: Guided, drafts: list[int] | None = None) -> set[int]:
    mask = state.allowed(drafts or [])
    assert mask is not None and mask.shape == (ROWS,)
    return set(mask.nonzero()[:, 0].tolist())


def spelled(prefix: str, words: list[str]) -> set[int]:
    """Tokens that continue the prefix towards one of the words, found by trying all."""
    texts = {token: tokenizer().decode([token]) for token in range(WORDS)}
    return {token for token, text in texts.items() if continues(prefix + text, words)}


def id_of(text: str) -> int:
    (token,) = tokenizer().encode(text)
    return token
