"""Learning a vocabulary (report §4.1): byte-level BPE in the released layout, or one token per character.

Layout of the BPE vocabulary, as released: 0 begin of sentence, 1 end, 2 padding, then 256 bytes, then merges in the
order in which they were learned, place holders up to the size asked for, and last the fill-in-the-middle and role
tokens. Place holders (the released vocabulary has 800) are ids that no text gives: a corpus too small for the
asked size still gets a vocabulary of exactly that size, and `Tokenizer.placeholders` says how many are empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from fathom.data.chat import ASSISTANT, USER
from fathom.errors import DataError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
EOT = "<|EOT|>"
PLACEHOLDER = "<｜place▁holder▁no▁{}｜>"

_FIRST = [BOS, EOS, PAD]
_LAST = [FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, EOT]
_SMALLEST_BPE = len(_FIRST) + 256 + len(_LAST)

# The pieces within which BPE merges, cut in three passes: what one pass isolates the next cannot join.
_NUMBERS = r"\p{N}{1,3}"
_HAN_AND_KANA = "[一-龥\u3040-\u309f\u30a0-\u30ff]+"
_REST = "|".join(
    (
        r"[!-/:-@\[-`{-~][A-Za-z]+",  # a symbol that leads a word: .append, _name, 'll
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",  # a word with the space or tab before it
        r" ?[\p{P}\p{S}]+[\r\n]*",  # symbols with the line's end behind them
        r"\s*[\r\n]+",  # line ends with the blanks before them
        r"\s+(?!\S)",  # blanks, but for the last, which goes with the word after it
        r"\s+",
    )
)
_LINE_START = re.compile(r"\n(?=[\w!-~])")
_ANY_CHARACTER = r"[\s\S]"


def pieces(text: str) -> list[str]:
    """The pieces that pre-tokenisation cuts `text` into; together they are the text."""
    splitter = pre_tokenizers.Sequence(_splits())
    return [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]


def stretches(text: str, size: int = 1_000_000) -> Iterator[str]:
    """`text` in parts of about `size` characters, cut where pre-tokenisation cuts anyway, so that ids stay the same.

    That is between a line's end and a visible character; a text without such a place stays whole.
    """
    start = 0
    while len(text) - start > size:
        line_start = _LINE_START.search(text, start + size)
        if line_start is None:
            break
        yield text[start : line_start.end()]
        start = line_start.end()
    yield text[start:]


def _splits() -> list[pre_tokenizers.Split]:
    return [_split(pattern) for pattern in (_NUMBERS, _HAN_AND_KANA, _REST)]


def _split(pattern: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Backend:
    """Byte-level BPE of exactly `vocab_size` ids; equal texts give equal tokenizers. Raises `DataError`."""
    if vocab_size < _SMALLEST_BPE:
        raise DataError(
            f"vocab_size={vocab_size} is too small for byte-level BPE: 256 bytes and "
            f"{_SMALLEST_BPE - 256} special tokens need {_SMALLEST_BPE}; ask for that many or more"
        )
    backend = Backend(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*_splits(), to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_LAST),
        min_frequency=2,  # a pair seen once says nothing about the language
        special_tokens=_control(_FIRST),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((part for text in texts for part in stretches(text)), trainer)
    _fill(backend, vocab_size - len(_LAST))
    backend.add_special_tokens(_control(_LAST))
    return backend


def train_characters(texts: Iterable[str], vocab_size: int | None) -> Backend:
    """One id per character of the texts in code point order, behind begin and end of sentence.

    With `vocab_size` None the vocabulary is exactly that; a larger one is filled with place holders, a smaller one
    is a `DataError`.
    """
    characters = sorted({character for text in texts for character in text})
    needed = len(characters) + 2
    if vocab_size is not None and vocab_size < needed:
        raise DataError(
            f"vocab_size={vocab_size} is too small: the corpus has {len(characters)} different characters and "
            f"2 special tokens; set vocab_size={needed}, or use the 'bpe' tokenizer"
        )
    vocabulary = {token: i for i, token in enumerate([BOS, EOS, *characters])}
    backend = Backend(models.WordLevel(vocabulary))
    backend.pre_tokenizer = _split(_ANY_CHARACTER)
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(_control([BOS, EOS]))
    _fill(backend, vocab_size or needed)
    return backend


def _control(spellings: list[str]) -> list[AddedToken]:
    return [AddedToken(spelling, normalized=False, special=True) for spelling in spellings]


def _fill(backend: Backend, size: int) -> None:
    """Place holders up to `size` ids."""
    missing = size - backend.get_vocab_size()
    backend.add_special_tokens(_control([PLACEHOLDER.format(i) for i in range(missing)]))
