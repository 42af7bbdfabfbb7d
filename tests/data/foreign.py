"""Small tokenizers of other kinds than ours, as other libraries write them."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

from fathom.data import Tokenizer

TEXTS = ["The cache holds 576 numbers.", "def greet(name):\n    return name\n", "naïve café"] * 20


def opened(backend: Backend, settings: dict[str, Any] | None = None) -> Tokenizer:
    return Tokenizer(backend.to_str(), settings or {})


def byte_bpe(normalizer: Any = None) -> Tokenizer:
    """As GPT-2 has it: one regular expression, a mark at the beginning of a text, no settings."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return opened(backend, {"eos_token": "<|endoftext|>"})


def sentence_bpe() -> Tokenizer:
    """As Llama 2 has it: blanks become ▁, unknown characters their bytes, a template that adds begin of sentence."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": b + 3 for b in range(256)}
    for token in ("▁", "t", "h", "e", "▁t", "▁th", "▁the"):
        vocabulary[token] = len(vocabulary)
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    backend = Backend(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return opened(backend, {"bos_token": "<s>", "eos_token": {"content": "</s>"}})


def whole_word_bpe() -> Tokenizer:
    """As Llama 3 has it: a word that is an entry is taken whole. Here the control token is an entry, too."""
    content = json.loads(byte_bpe()._definition)
    content["model"]["ignore_merges"] = True
    content["pre_tokenizer"]["use_regex"] = False
    return Tokenizer(json.dumps(content), {})


def unigram(pieces: list[tuple[str, float]] | None = None) -> Tokenizer:
    """As T5 has it: likeliest pieces, blanks become ▁, also before a text."""
    characters = sorted({c for text in TEXTS for c in text} | {"▁"})
    known = [("<unk>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in characters if c not in ".\n ")]
    known += pieces or [("▁the", -2.0), (".", -4.0), ("\n", -4.0)]
    backend = Backend(models.Unigram(known, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    return opened(backend, {"eos_token": "</s>"})


def word_piece() -> Tokenizer:
    """As BERT has it: lower case, words, [UNK]; truncation and padding switched on in the file."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    cls, sep = (backend.token_to_id(t) for t in ("[CLS]", "[SEP]"))
    backend.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    return opened(backend, {"bos_token": "[CLS]", "eos_token": "[SEP]"})


def with_dropout() -> Tokenizer:
    """A BPE whose file says that merges are left out at random, as in someone's training."""
    content = json.loads(byte_bpe()._definition)
    content["model"]["dropout"] = 0.5
    return Tokenizer(json.dumps(content), {})


def splitting(pattern: str) -> Tokenizer:
    """Byte-level BPE with a regular expression of its own."""
    content = byte_bpe()._definition
    backend = Backend.from_str(content)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return opened(backend)
