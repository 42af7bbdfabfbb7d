"""Does de-duplication find what was planted, and is every broken line accounted for?

    python benchmarks/data_quality.py FOLDER [--documents N] [--libraries | --shingles]

FOLDER holds .jsonl or .jsonl.gz of real text with the fields "text" and, for Chinese, names that begin with zh_; for
code, code_. From it come N documents each of English, Chinese and code that are all different (no two reach an
edit similarity of 0.6, every pair compared). Copies are planted beside them: equal ones, and ones with 5 % or 10 % of
their words or of their characters replaced, deleted or doubled at random. Beside those stand documents that share
their first half with another (they must be kept) and lines that are broken in six ways. Then `prepare` runs, and its
rejects.jsonl is compared with the truth. `--libraries` compares the MinHash libraries that were at choice, `--shingles`
the lengths of n-grams: what unrelated texts have in common, and what edits leave.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import describe, environment, table

from fathom.data import prepare
from fathom.data.pipeline.signatures import PLACES, _hashes, comparable

CLASSES = ("exact", "words 5 %", "words 10 %", "characters 5 %", "characters 10 %")
BROKEN = {
    b'{"text": "cut of': "broken JSON",
    b'{"text": "\xff\xfe"}': "broken JSON",
    b'{"txet": "misspelt"}': 'no text in field "text"',
    b'{"text": null}': 'no text in field "text"',
    b'["a", "list"]': 'no text in field "text"',
    b'{"text": "half \\ud83d a pair"}': "half a surrogate pair",
}
EVERY_BROKEN = 20
LONGEST = 20_000


@dataclass(frozen=True)
class Planted:
    """A line of the corpus: its text, its language, and the number and class of the original it copies."""

    text: str
    language: str
    original: int
    kind: str


def main(arguments: list[str] | None = None) -> None:
    """Plant, prepare, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=360, help="originals of each language")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--libraries", action="store_true")
    parser.add_argument("--shingles", action="store_true")
    options = parser.parse_args(arguments)
    print(describe(environment()))
    print("command: python benchmarks/data_quality.py", *(arguments or sys.argv[1:]), end="\n\n")
    draw = random.Random(options.seed)
    originals = {
        language: distinct(texts, options.documents)
        for language, texts in read(options.folder, draw).items()
    }
    if options.libraries:
        compare_libraries(originals)
        return
    if options.shingles:
        compare_shingles(originals)
        return
    corpus = plant(originals, draw)
    with tempfile.TemporaryDirectory() as folder:
        report(corpus, Path(folder))


def read(folder: Path, draw: random.Random) -> dict[str, list[str]]:
    """Texts of 300 characters and more (of Chinese 80) by language, shuffled, cut to `LONGEST`."""
    found: dict[str, list[str]] = {"English": [], "Chinese": [], "code": []}
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]):
        start = path.name.split("_")[0]
        language = {"zh": "Chinese", "code": "code"}.get(start, "English")
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            texts = [json.loads(line)["text"][:LONGEST] for line in file]
        least = 80 if language == "Chinese" else 300
        draw.shuffle(texts)
        found[language] += [text for text in texts if len(text) >= least][:1000]
    for texts in found.values():
        draw.shuffle(texts)
    return found


def distinct(texts: list[str], count: int) -> list[str]:
    """The first `count` of which no two are alike, every pair compared (the first 2,000 characters of each)."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    chosen = texts[: count + count // 3]
    heads = [comparable(text[:2000]) for text in chosen]
    alike = cdist(heads, heads, scorer=Levenshtein.normalized_similarity, score_cutoff=0.6) > 0
    np.fill_diagonal(alike, False)
    kept: list[int] = []
    for i in range(len(chosen)):
        if not alike[i, kept].any():
            kept.append(i)
    return [chosen[i] for i in kept[:count]]


def plant(originals: dict[str, list[str]], draw: random.Random) -> list[Planted]:
    """Originals, copies of each class for five sixths of them, half-alike documents for the rest; shuffled."""
    corpus, number = [], 0
    for language, texts in originals.items():
        for i, text in enumerate(texts):
            corpus.append(Planted(text, language, number, "original"))
            kind = [*CLASSES, "half"][i % 6]
            copy = text[: len(text) // 2] + texts[i - 1][len(texts[i - 1]) // 2 :]
            if kind != "half":
                copy = edited(text, kind, draw)
            corpus.append(Planted(copy, language, number, kind))
            number += 1
    draw.shuffle(corpus)
    return corpus


def edited(text: str, kind: str, draw: random.Random) -> str:
    """A copy with the share of edits that its class names; words of Chinese are its characters."""
    if kind == "exact":
        return text
    rate = float(kind.split()[1]) / 100
    pieces = (
        list(text)
        if kind.startswith("characters")
        else re.findall(r"\s|[^\W\u3400-\u9fff]+|.", text)
    )
    others = sorted({piece for piece in pieces if piece.strip()})
    return "".join(
        _edit(piece, others, draw) if piece.strip() and draw.random() < rate else piece
        for piece in pieces
    )


def _edit(piece: str, others: list[str], draw: random.Random) -> str:
    other = draw.choice(others)
    return draw.choice((other, "", piece + other))


def lines(corpus: list[Planted]) -> Iterator[bytes]:
    """The corpus as .jsonl, a broken line after every few."""
    broken = list(BROKEN)
    for i, document in enumerate(corpus):
        yield json.dumps({"text": document.text}, ensure_ascii=False).encode()
        if i % EVERY_BROKEN == 0:
            yield broken[i // EVERY_BROKEN % len(broken)]


def report(corpus: list[Planted], folder: Path) -> None:
    """Prepare and print what was found of what was planted."""
    content = list(lines(corpus))
    (folder / "corpus.jsonl").write_bytes(b"\n".join(content) + b"\n")
    documents = iter(corpus)
    line_of = {
        number: next(documents) for number, line in enumerate(content, 1) if line not in BROKEN
    }
    began = time.perf_counter()
    data = prepare(
        folder / "out", [str(folder / "corpus.jsonl")], "bpe", 1000, dedup="near", say=print
    )
    print(f"{len(corpus):,} documents prepared in {time.perf_counter() - began:.1f} s\n")
    with open(folder / "out" / "rejects.jsonl", encoding="utf-8") as file:
        rejects = [json.loads(line) for line in file]
    _print_found(corpus, [r for r in rejects if r["kind"] != "unreadable"], line_of)
    _print_broken(content, [r for r in rejects if r["kind"] == "unreadable"])
    kept = sum(data.manifest["documents"].values())
    print(
        f"kept {kept:,} + left out {len(rejects):,} = {kept + len(rejects):,} of {len(content):,} lines"
    )


def _print_found(corpus: list[Planted], removed: list[dict], line_of: dict[int, Planted]) -> None:
    pairs = {document.original: document for document in corpus if document.kind != "original"}
    found = Counter(line_of[int(line["place"].split(":")[1])].original for line in removed)
    languages = sorted({document.language for document in corpus})
    rows, right = [], 0
    for kind in (*CLASSES, "half"):
        cells = []
        for language in languages:
            numbers = [
                n for n, copy in pairs.items() if (copy.kind, copy.language) == (kind, language)
            ]
            hit = sum(found[n] > 0 for n in numbers)
            right += hit if kind != "half" else 0
            cells.append(f"{hit} of {len(numbers)} ({hit / len(numbers):.1%})")
        rows.append([kind, *cells])
    print(table(["planted copies found", *languages], rows))
    print(
        f"\nprecision: {right} of {len(removed)} documents left out were planted copies ({right / len(removed):.2%})"
    )


def _print_broken(content: list[bytes], rejects: list[dict]) -> None:
    planted = {i: BROKEN[line] for i, line in enumerate(content, 1) if line in BROKEN}
    told = {int(reject["place"].split(":")[1]): reject["reason"] for reject in rejects}
    right = sum(told.get(i) == why for i, why in planted.items())
    wrong = len(told.keys() - planted.keys())
    print(f"broken lines: {right} of {len(planted)} told with place and reason, {wrong} others")


def compare_libraries(originals: dict[str, list[str]]) -> None:
    """Time of signatures and error of the estimate, on the same sets of n-grams."""
    import datasketch
    import rensa

    texts = [text for some in originals.values() for text in some]
    draw = random.Random(1)
    copies = [edited(text, "words 10 %", draw) for text in texts]
    sets = [np.unique(_hashes(comparable(text))) for text in (*texts, *copies)]
    half = len(texts)
    true = np.array([_jaccard(sets[i], sets[i + half]) for i in range(half)])
    size = sum(len(text.encode()) for text in (*texts, *copies)) / 1e6

    def by_rensa() -> np.ndarray:
        bounds = np.cumsum([0, *map(len, sets)], dtype=np.uint64)
        make = rensa.RMinHash.digest_matrix_from_flat_token_hashes
        return np.array(make(np.concatenate(sets), bounds, PLACES, 1).to_rows(), np.uint32)

    def by_datasketch() -> np.ndarray:
        empty = datasketch.MinHash(PLACES, hashfunc=lambda values: values)
        rows = []
        for values in sets:
            one = empty.copy()
            one.update_batch([(values >> np.uint64(32)).astype(np.uint32)])
            rows.append(one.hashvalues)
        return np.array(rows)

    print(f"\n{len(sets)} texts, {size:.1f} MB, {PLACES} places, one thread\n")
    lines = []
    ideal = np.sqrt((true * (1 - true)).mean() / PLACES)
    for name, make in (("rensa", by_rensa), ("datasketch", by_datasketch)):
        times, rows = [], np.empty(0)
        for _ in range(3):
            began = time.perf_counter()
            rows = make()
            times.append(time.perf_counter() - began)
        error = (rows[:half] == rows[half:]).mean(axis=1) - true
        seconds = sorted(times)[1]
        figures = (seconds, size / seconds, error.mean(), error.std(), ideal)
        lines.append([name, *(f"{figure:.4g}" for figure in figures)])
    headers = ["library", "seconds", "MB/s", "mean error", "standard error", "of an ideal one"]
    print(table(headers, lines))


def compare_shingles(originals: dict[str, list[str]], count: int = 60) -> None:
    """Jaccard similarities of unrelated texts and of copies, by language and length of the n-grams."""
    lines = []
    for language, texts in originals.items():
        draw = random.Random(2)
        chosen = texts[:count]
        copies = [edited(text, "characters 10 %", draw) for text in chosen]
        for n in (3, 4, 5, 8, 10):
            sets, copied = ([_grams(text, n) for text in some] for some in (chosen, copies))
            unrelated = np.array([_jaccard(a, b) for i, a in enumerate(sets) for b in sets[:i]])
            kept = np.array([_jaccard(a, b) for a, b in zip(sets, copied, strict=True)])
            figures = (unrelated.mean(), (unrelated**2).mean(), *np.quantile(kept, (0.05, 0.5)))
            lines.append([language, str(n), *(f"{figure:.2g}" for figure in figures)])
    headers = [
        "",
        "n",
        "unrelated: mean J",
        "mean J²",
        "10 % of characters edited: 5 % have less than",
        "median",
    ]
    print(table(headers, lines))


def _grams(text: str, n: int) -> np.ndarray:
    shown = comparable(text)
    return np.unique([hash(shown[i : i + n]) for i in range(max(1, len(shown) - n + 1))])


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


if __name__ == "__main__":
    main()
