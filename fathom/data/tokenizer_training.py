"""From sources to a tokenizer of their own, with what it is worth (report §4.1).

The sources are read three times: once to know how much there is, once to count pieces, and a sample of some megabytes
to see how well the tokenizer compresses them. Memory holds the different pieces, which grow with the text: Chinese
clauses above all are seldom seen twice. Of a corpus above a limit a part is therefore taken, document by document, by a
draw that depends on the document alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from fathom.data.draws import key_of, uniform
from fathom.data.progress import Say
from fathom.data.rejects import Rejects
from fathom.data.sources import read_documents
from fathom.data.tokenizer import Tokenizer
from fathom.errors import DataError

READ_AT_MOST = 100_000_000
"""About how many bytes a tokenizer is learned from (our choice): two GiB of memory for a mixture of languages."""
SAMPLE_BYTES = 4_000_000
"""About how much text is encoded to measure bytes per token."""
_BATCH = 64


@dataclass(frozen=True)
class Trained:
    """A tokenizer and where it comes from; `seconds` is the training alone, `bytes` all text found."""

    tokenizer: Tokenizer
    documents: int
    bytes: int
    rejects: Rejects
    seconds: float
    bytes_per_token: float


def train_on(
    sources: Sequence[str], vocab_size: int, say: Say, read_at_most: int = READ_AT_MOST
) -> Trained:
    """A byte-level BPE of `vocab_size` ids learned from `sources` (see `read_documents`).

    Of sources with more than `read_at_most` bytes of text, about that much is used (see `part_of`). `say` hears what
    was found and how far it is. Raises `DataError`, also for sources without any usable text.
    """
    rejects = Rejects()
    documents, size = _survey(sources, rejects)
    if not size:
        reason = rejects.summary() if rejects.total else "there is no text in it"
        raise DataError(
            f"nothing to learn from in {', '.join(sources)}: {reason}; give .txt, .md, code, .jsonl or .parquet"
        )
    say(f"{documents:,} documents, {size / 1e6:.1f} MB; {rejects.summary()}")
    began = time.monotonic()
    texts = part_of(_texts(sources, Rejects()), size, read_at_most, say)
    tokenizer = Tokenizer.train(texts, vocab_size, "bpe", say, min(size, read_at_most))
    seconds = time.monotonic() - began
    every = max(1, round(size / SAMPLE_BYTES))
    sample = (text for i, text in enumerate(_texts(sources, Rejects())) if i % every == 0)
    return Trained(tokenizer, documents, size, rejects, seconds, bytes_per_token(tokenizer, sample))


def part_of(texts: Iterable[str], size: int, read_at_most: int, say: Say) -> Iterator[str]:
    """Those texts whose draws lie below `read_at_most` / `size`; all when `size`, their bytes, is no more than that.

    A draw depends on the text alone, so equal corpora give equal parts in any order of files.
    """
    if size > read_at_most:
        say(f"learning from about {read_at_most / 1e6:.0f} MB of it, documents taken by hash")
    share = read_at_most / max(size, 1)
    for text in texts:
        if share >= 1 or uniform(key_of(text, 0), "tokenizer", 1)[0] < share:
            yield text


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Bytes of UTF-8 that a token stands for, over all `texts`; NaN for none."""
    size = tokens = 0
    batch: list[str] = []
    for part in chain.from_iterable(tokenizer.stretches(text) for text in texts):
        size += len(part.encode())
        batch.append(part)
        if len(batch) == _BATCH:
            tokens += sum(map(len, tokenizer.encode_batch(batch)))
            batch = []
    tokens += sum(map(len, tokenizer.encode_batch(batch)))
    return size / tokens if tokens else float("nan")


def _texts(sources: Sequence[str], rejects: Rejects) -> Iterator[str]:
    for source in sources:
        for document in read_documents(source, rejects):
            yield document.text


def _survey(sources: Sequence[str], rejects: Rejects) -> tuple[int, int]:
    """Documents and bytes of text."""
    documents = size = 0
    for text in _texts(sources, rejects):
        documents += 1
        size += len(text.encode())
    return documents, size
