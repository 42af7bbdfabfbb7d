"""Learning a vocabulary (report §4.1): byte-level BPE in the released layout, or one token per character.

Layout of a BPE vocabulary: 0 begin of sentence, 1 end, 2 padding, then 256 bytes, then merges in the order in which
they were learned, and last the fill-in-the-middle and role tokens. From `RELEASED_SIZE` ids on every part has its
released id: merges end before 128000, 800 place holders follow, 128800 is the first fill-in-the-middle token, the
tool tokens end with 128814. A smaller vocabulary has the six tokens behind its last merge and none for tools.

Place holders are ids that no text gives. They also stand for merges that a small corpus did not have, and for ids
above the released ones (the released embedding has 129,280 rows), so that a vocabulary has exactly the size asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from fathom.data.chat import ASSISTANT, USER
from fathom.data.progress import Say, TrainingProgress
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
_TOOL_PARTS = ("calls", "call", "outputs", "output")
_OF_TOOLS = [f"{what}▁{end}" for what in _TOOL_PARTS for end in ("begin", "end")]
_TOOLS = [f"<｜tool▁{name}｜>" for name in (*_OF_TOOLS, "sep")]
_SMALLEST_BPE = len(_FIRST) + 256 + len(_LAST)

RELEASED_MERGED = 128_000
"""Ids of the released vocabulary up to its last merge."""
RELEASED_CONTROL = 128_800
"""Id of the first token behind the released place holders."""
RELEASED_SIZE = RELEASED_CONTROL + len(_LAST) + len(_TOOLS)

# The pieces within which BPE merges, cut in three passes: what one pass isolates the next cannot join. Spelled as in
# the released file, to the character, so that a file that cuts like this one is recognised.
_NUMBERS = r"\p{N}{1,3}"
_HAN_AND_KANA = "[一-龥\u3040-\u309f\u30a0-\u30ff]+"
_REST = "|".join(
    (
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",  # a symbol that leads a word: .append
        "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+",  # a word with the space or tab before it
        " ?[\\p{P}\\p{S}]+[\r\n]*",  # symbols with the line's end behind them
        "\\s*[\r\n]+",  # line ends with the blanks before them
        r"\s+(?!\S)",  # blanks, but for the last, which goes with the word after it
        r"\s+",
    )
)
_CERTAIN_CUT = re.compile(
    r"(?<=\n)(?=[\w!-~])"  # a line's start
    r"|(?<=[A-Za-z])(?= [A-Za-z])"  # between two words
    f"|(?<={_HAN_AND_KANA[:-1]})(?!{_HAN_AND_KANA[:-1]})"  # the end of a Han or kana run
)
_ANY_CHARACTER = r"[\s\S]"
_READ_AT_ONCE = 100_000
"""Characters that the trainer gets as one text: it holds 256 texts at a time."""


def empty_by_layout(vocab_size: int, kind: str = "bpe") -> int:
    """Place holders that a vocabulary has however much text it is learned from: the released layout's."""
    if kind != "bpe" or vocab_size < RELEASED_SIZE:
        return 0
    return RELEASED_CONTROL - RELEASED_MERGED + vocab_size - RELEASED_SIZE


def pieces(text: str) -> list[str]:
    """The pieces that pre-tokenisation cuts `text` into; together they are the text."""
    splitter = pre_tokenizers.Sequence(_splits())
    return [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]


def stretches(text: str, size: int = 1_000_000) -> Iterator[str]:
    """`text` in parts of about `size` characters, cut where pre-tokenisation cuts anyway, so that ids stay the same.

    A text without a place where that is certain (a megabyte of digits, say) stays whole.
    """
    start = 0
    while len(text) - start > size:
        cut = _CERTAIN_CUT.search(text, start + size)
        if cut is None or cut.start() == len(text):
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def cuts_like_released(definition: Mapping[str, Any]) -> bool:
    """Whether the content of a tokenizer.json cuts text where `stretches` counts on it, and changes nothing before."""
    ours = json.loads(pre_tokenizers.Sequence(_splits()).__getstate__())["pretokenizers"]
    found = definition.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers", [found])
    by_character = json.loads(_split(_ANY_CHARACTER).__getstate__())
    return definition.get("normalizer") is None and (
        parts[: len(ours)] == ours or parts == [by_character]
    )


def _splits() -> list[pre_tokenizers.Split]:
    return [_split(pattern) for pattern in (_NUMBERS, _HAN_AND_KANA, _REST)]


def _split(pattern: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def train_bpe(
    texts: Iterable[str], vocab_size: int, say: Say | None = None, total_bytes: int | None = None
) -> Backend:
    """Byte-level BPE of exactly `vocab_size` ids; equal texts give equal tokenizers. Raises `DataError`.

    Memory holds the different pieces with their counts and a few texts, not the corpus. `say` hears how far it is,
    with the time left where `total_bytes` says how much text will come.
    """
    if vocab_size < _SMALLEST_BPE:
        raise DataError(
            f"vocab_size={vocab_size} is too small for byte-level BPE: 256 bytes and "
            f"{_SMALLEST_BPE - 256} special tokens need {_SMALLEST_BPE}; ask for that many or more"
        )
    as_released = vocab_size >= RELEASED_SIZE
    control = RELEASED_CONTROL if as_released else vocab_size - len(_LAST)
    backend = _learned(texts, RELEASED_MERGED if as_released else control, say, total_bytes)
    placeholders = _fill(backend, control)
    backend.add_special_tokens(_control(_LAST + _TOOLS if as_released else _LAST))
    _fill(backend, vocab_size, placeholders)
    return backend


def _learned(texts: Iterable[str], size: int, say: Say | None, total_bytes: int | None) -> Backend:
    """The first control tokens, the bytes, and merges up to `size` ids."""
    backend = Backend(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*_splits(), to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,  # a pair seen once says nothing about the language
        special_tokens=_control(_FIRST),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    parts = (part for text in texts for part in stretches(text, _READ_AT_ONCE))
    with TrainingProgress(say, total_bytes) as progress:
        backend.train_from_iterator(progress.reading(parts), trainer)
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


def _fill(backend: Backend, size: int, number: int = 0) -> int:
    """Place holders up to `size` ids, numbered from `number`; gives the next number."""
    end = number + size - backend.get_vocab_size()
    backend.add_special_tokens(_control([PLACEHOLDER.format(i) for i in range(number, end)]))
    return end
