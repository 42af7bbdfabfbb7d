"""The making of a prepared folder, step by step; each step finds what an earlier process has finished.

1. read: every unit of the sources becomes clean text with hashes and signatures (`reading`);
2. duplicates: which documents repeat others (`deduplication`);
3. tokenizer: loaded, or trained on the training side of what is kept;
4. encode: stretches of text become tokens in the order of training (`encoding`);
5. pack: buckets of that order become shards (`packing`);
6. result: shards, tokenizer, rejects and the manifest in one folder.

Steps 1, 4 and 5 run in worker processes. Memory holds a stretch of text per worker and some 60 bytes per document, with
near-duplicate removal some 800 more while signatures are compared; never the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from fathom.data.pipeline.deduplication import NEAR, Duplicates, find_duplicates
from fathom.data.pipeline.encoding import SIDES, EncodeJob, encode_stretch
from fathom.data.pipeline.packing import ShardRecord, buckets, pack_bucket, read_record
from fathom.data.pipeline.plan import TRAINED, Plan
from fathom.data.pipeline.reading import Corpus, ReadJob, read_unit
from fathom.data.pipeline.work import WorkFolder, finishing
from fathom.data.pipeline.workers import Workers
from fathom.data.progress import Progress, Say
from fathom.data.split import DOCUMENTS, TAIL, Split, lopsided
from fathom.data.tokenizer import Tokenizer
from fathom.data.tokenizer_training import READ_AT_MOST, part_of
from fathom.data.vocabulary import empty_by_layout
from fathom.errors import DataError

STRETCH_BYTES = 8_000_000
"""About how much text is encoded at a time."""

Task = tuple[tuple, Path, int]
"""Arguments of a function, the piece of work that it makes (its last argument) and its size in bytes."""


@dataclass
class Making:
    """One preparation under way."""

    plan: Plan
    work: WorkFolder
    workers: Workers
    say: Say
    show: Say

    def read(self) -> None:
        """Step 1."""
        settings = self.plan.settings
        job = ReadJob(settings.normalise, settings.filters, self.split, settings.dedup == NEAR)
        tasks = [
            ((job, unit), piece, unit.bytes)
            for unit, piece in zip(self.plan.units, self._read_pieces, strict=True)
        ]
        self._run("reading", read_unit, tasks)

    @property
    def split(self) -> Split:
        """How the settings want the text divided."""
        settings = self.plan.settings
        return Split(settings.held_out_kind, settings.held_out, settings.seed)

    @property
    def _read_pieces(self) -> list[Path]:
        return [self.work.piece("read", i) for i in range(len(self.plan.units))]

    def _run(self, what: str, function: Callable[..., int], tasks: list[Task]) -> None:
        """Do what is not done yet; `function` gives the bytes it has dealt with."""
        progress = Progress(what, sum(size for *_, size in tasks), self.show)
        left = []
        for arguments, piece, size in tasks:
            if piece.is_dir():
                progress.skip(size)
            else:
                left.append((*arguments, piece))
        for _, size in self.workers.map(function, left):
            progress.add(size)

    @cached_property
    def corpus(self) -> Corpus:
        """What step 1 gave."""
        return Corpus(self.plan.units, self._read_pieces)

    @cached_property
    def duplicates(self) -> Duplicates:
        """What step 2 found."""
        piece = self.work.piece("duplicates", self.plan.settings.dedup)
        kind = self.plan.settings.dedup
        return find_duplicates(self.corpus, kind, piece, self.workers, self.say, self.show)

    def deduplicate(self) -> None:
        """Step 2, here and not in the middle of a later one that asks for it."""
        _ = self.duplicates

    @cached_property
    def kept(self) -> np.ndarray:
        """int64: the documents that are used, in reading order."""
        return self.duplicates.kept

    @cached_property
    def splits(self) -> list[Split]:
        """How each source is divided: a source of few documents gives up the tail of each instead of some documents."""
        return [self._split_of(i) for i in range(len(self.plan.settings.sources))]

    def _split_of(self, source: int) -> Split:
        index = self.corpus.index[self.kept[self.corpus.sources()[self.kept] == source]]
        split, name = self.split, self.plan.settings.sources[source].name
        if not len(index):
            raise DataError(
                f"every document of {name} repeats one of the sources before it; leave it out, or take dedup='none'"
            )
        if split.kind == DOCUMENTS and lopsided(index["side"], index["bytes"], split):
            self.say(
                f"{name}: documents too few or too unequal to hold some out; the tail of each is held out instead"
            )
            return replace(split, kind=TAIL)
        return split

    def tokenizer(self) -> Tokenizer:
        """Step 3: trained on the training side only, but for characters: an alphabet is not learned, and it must be
        complete."""
        piece = self.work.piece("tokenizer", "tokenizer")
        if piece.is_dir():
            return Tokenizer.load(piece)
        tokenizer = self._make_tokenizer()
        with finishing(piece) as folder:
            tokenizer.save(folder)
        return tokenizer

    def _make_tokenizer(self) -> Tokenizer:
        kind, size = self.plan.settings.tokenizer, self.plan.settings.vocab_size
        if kind not in TRAINED:
            return loaded_tokenizer(kind, size)
        self.say(f"training a {kind} tokenizer")
        texts, read = self._training_texts(kind == "char"), None
        if kind == "bpe":
            found = int(self.corpus.index["bytes"][self.kept].sum())
            texts, read = part_of(texts, found, READ_AT_MOST, self.say), min(found, READ_AT_MOST)
        tokenizer = Tokenizer.train(texts, size, kind, self.say, read)
        unused = tokenizer.placeholders - empty_by_layout(tokenizer.vocab_size, kind)
        if unused > 0:
            self.say(
                f"the corpus gives {tokenizer.vocab_size - unused:,} of the {size:,} tokens asked for; the rest stays "
                f"unused (more text or a smaller vocab_size avoids that)"
            )
        return tokenizer

    def _training_texts(self, held_out_too: bool) -> Iterable[str]:
        sources = self.corpus.sources()[self.kept]
        for text, source in zip(self.corpus.texts(self.kept), sources, strict=True):
            for piece in self.splits[source].pieces(text):
                if held_out_too or not piece.held_out:
                    yield piece.text

    def encode(self, tokenizer: Tokenizer) -> None:
        """Step 4."""
        settings, folder = self.plan.settings, self.work.piece("tokenizer", "tokenizer")
        rates = settings.fim_rate, settings.split_rate
        job = EncodeJob(str(folder), dtype_of(tokenizer), *rates)
        tasks = []
        for source, unit, number, documents in self._stretches:
            entries = self.corpus.index[documents]
            arguments = (job, self.splits[source], self._read_pieces[unit], entries)
            piece = self.work.piece("encoded", number)
            tasks.append((arguments, piece, int(entries["bytes"].sum())))
        self._run("encoding", encode_stretch, tasks)

    @cached_property
    def _stretches(self) -> list[tuple[int, int, int, np.ndarray]]:
        """(source, unit, number, kept documents) of every stretch of text that is encoded at a time."""
        found: list[tuple[int, int, int, np.ndarray]] = []
        for i, unit in enumerate(self.plan.units):
            low, high = np.searchsorted(self.kept, self.corpus.first[i : i + 2])
            documents = self.kept[low:high]
            ends = np.cumsum(self.corpus.index["bytes"][documents])
            for part in np.split(documents, np.flatnonzero(np.diff(ends // STRETCH_BYTES)) + 1):
                if len(part):
                    found.append((unit.source, i, len(found), part))
        return found

    def pack(self, tokenizer: Tokenizer) -> dict[tuple[str, str], list[ShardRecord]]:
        """Step 5: records of the shards by source and side."""
        dtype, tasks = dtype_of(tokenizer), []
        shards: dict[tuple[str, str], list[Path]] = {}
        for i, source in enumerate(self.plan.settings.sources):
            pieces = [self.work.piece("encoded", n) for s, _, n, _ in self._stretches if s == i]
            end_last = self.splits[i].kind == DOCUMENTS
            for side in SIDES:
                names = shards.setdefault((source.name, side), [])
                found = buckets(side, pieces)
                size = sum((p / f"{side}.bin").stat().st_size for p in pieces) // max(1, len(found))
                for k, bucket in enumerate(found):
                    piece = self.work.piece("packed", f"{source.name}.{side}-{k:05}")
                    arguments = (bucket, pieces, dtype, end_last, f"{side}-{k:05}")
                    tasks.append((arguments, piece, size))
                    names.append(piece)
        self._run("packing", pack_bucket, tasks)
        return {
            (name, side): [replace(read_record(p), file=f"{name}/{read_record(p).file}") for p in pieces]
            for (name, side), pieces in shards.items()
        }  # fmt: skip

    def content_sha256(self) -> str:
        """Of the length and the bytes of every document that is used, in reading order."""
        digest = sha256()
        for text in self.corpus.texts(self.kept):
            content = text.encode()
            digest.update(len(content).to_bytes(8) + content)
        return digest.hexdigest()


def dtype_of(tokenizer: Tokenizer) -> str:
    """How a token is stored."""
    return "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"


def loaded_tokenizer(path: str, size: int | None) -> Tokenizer:
    """A tokenizer that exists. Raises `DataError` when it has more ids than the model."""
    tokenizer = Tokenizer.load(path)
    if size is not None and tokenizer.vocab_size > size:
        raise DataError(
            f"the tokenizer {path} has {tokenizer.vocab_size} ids, the model's vocab_size is {size}; "
            f"set vocab_size={tokenizer.vocab_size} or more"
        )
    return tokenizer


def result_counts(records: dict[tuple[str, str], list[ShardRecord]], field: str) -> dict[str, Any]:
    """Sums of a field of the records for each side."""
    return {
        side: sum(getattr(r, field) for (_, s), some in records.items() if s == side for r in some)
        for side in SIDES
    }
