"""Training a tokenizer: seconds, peak memory, the same bytes for any number of threads, and compression.

The corpus is a folder of texts, file by file, and behind it this Python's standard library; the last twentieth of
every document is held out. More text than that is made by reading the corpus again, and the table says how much of it
is distinct: repeated text costs time like new text but brings no new pieces. Each training is a process of its own.
Compression is measured on the held-out text, by kind (files named en_, zh_, code_; others count as English, the
standard library as code), beside another tokenizer if one is given.
`python benchmarks/tokenizer_training.py FOLDER --help`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
from harness import MIB, describe, environment, peak_bytes, resident_bytes, table, write_json

from fathom.data import Rejects, Tokenizer, read_documents
from fathom.data.boundary import RATE, MergedTokens
from fathom.data.draws import key_of
from fathom.data.split import TAIL, Split

STDLIB = "stdlib"
HELD_OUT = Split(TAIL, 0.05, 0)


def pieces(folder: Path, held_out: bool) -> Iterator[tuple[str, str]]:
    """(kind, text) of one side of the corpus, in the order of reading."""
    for source in [*sorted(map(str, folder.iterdir())), STDLIB]:
        for document in read_documents(source, Rejects()):
            for piece in HELD_OUT.pieces(document.text):
                if piece.held_out == held_out:
                    yield kind_of(source), piece.text


def kind_of(source: str) -> str:
    name = Path(source).name
    if name == STDLIB or name.startswith("code_"):
        return "code"
    return "Chinese" if name.startswith("zh_") else "English"


def texts(folder: Path, size: int, seen: dict[str, int]) -> Iterator[str]:
    """Training text of `size` bytes, the corpus again and again; `seen` counts bytes, and those of the first pass."""
    seen |= {"bytes": 0, "distinct": 0}
    for first in chain([True], repeat(False)):
        for _, text in pieces(folder, held_out=False):
            yield text
            length = len(text.encode())
            seen["bytes"] += length
            seen["distinct"] += length if first else 0
            if seen["bytes"] >= size:
                return


def train(folder: Path, megabytes: int, vocab_size: int, out: Path, pipe: Any) -> None:
    """In a process of its own, which has RAYON_NUM_THREADS from its parent."""
    seen: dict[str, int] = {}
    before, began, worked = resident_bytes(), time.monotonic(), time.process_time()
    tokenizer = Tokenizer.train(texts(folder, megabytes * 10**6, seen), vocab_size)
    seconds = time.monotonic() - began
    peak = peak_bytes()
    tokenizer.save(out)
    digest = hashlib.sha256((out / "tokenizer.json").read_bytes()).hexdigest()
    pipe.send(
        {
            "megabytes": seen["bytes"] / 1e6,
            "distinct_megabytes": seen["distinct"] / 1e6,
            "vocab_size": vocab_size,
            "threads": os.environ["RAYON_NUM_THREADS"],
            "seconds": seconds,
            "cpu_seconds": time.process_time() - worked,
            "before_mib": before / MIB,
            "peak_mib": peak / MIB,
            "unused": tokenizer.placeholders,
            "sha256": digest,
        }
    )


def trained(
    folder: Path, megabytes: int, vocab_size: int, threads: int, out: Path
) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    process = context.Process(target=train, args=(folder, megabytes, vocab_size, out, theirs))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result


def compression(name: str, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """By kind: bytes per token, share of tokens that join punctuation and line ends, what splitting them costs."""
    merged = MergedTokens.of(tokenizer)
    sums: dict[str, np.ndarray] = {}
    for kind, text in pieces(folder, held_out=True):
        ids = np.array(tokenizer.encode(text))
        split = len(merged.split(ids, RATE, key_of(text, 0))) if len(merged.ids) else len(ids)
        joined = int((merged.length[ids] > 1).sum())
        row = np.array([len(text.encode()), len(ids), joined, split])
        sums[kind] = sums.get(kind, 0) + row
    kinds = {
        kind: {
            "bytes": int(size),
            "bytes_per_token": size / count,
            "merged_share": joined / count,
            "longer_when_split": split / count - 1,
        }
        for kind, (size, count, joined, split) in sorted(sums.items())
    }
    return {"name": name, "vocab_size": tokenizer.vocab_size, "kinds": kinds}


def training_table(rows: list[dict[str, Any]]) -> str:
    heads = ["ids", "MB", "of which distinct", "threads", "seconds", "CPU seconds", "peak MiB"]
    heads += ["of which before", "unused ids", "sha256 of tokenizer.json"]
    return table(
        heads,
        [
            [
                f"{r['vocab_size']:,}",
                f"{r['megabytes']:.1f}",
                f"{r['distinct_megabytes']:.1f}",
                r["threads"],
                f"{r['seconds']:.1f}",
                f"{r['cpu_seconds']:.1f}",
                f"{r['peak_mib']:.0f}",
                f"{r['before_mib']:.0f}",
                f"{r['unused']:,}",
                r["sha256"][:12],
            ]
            for r in rows
        ],
    )


def compression_table(rows: list[dict[str, Any]]) -> str:
    kinds = sorted(rows[0]["kinds"])
    heads = ["tokenizer", "ids", *(f"{kind}: bytes per token" for kind in kinds)]
    heads += [f"{kind}: merged, longer at rate {RATE}" for kind in kinds]
    lines = []
    for row in rows:
        found = [row["kinds"][kind] for kind in kinds]
        lines.append(
            [
                row["name"],
                f"{row['vocab_size']:,}",
                *(f"{k['bytes_per_token']:.3f}" for k in found),
                *(f"{k['merged_share']:.2%}, {k['longer_when_split']:.2%}" for k in found),
            ]
        )
    return table(heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="texts, see `fathom.data.read_documents`")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[25, 50, 100])
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[32_000, 128_815])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--beside", type=Path, help="a tokenizer.json to compare compression with")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    given = parser.parse_args()
    facts = environment()
    print(describe(facts), "\ncommand: python", " ".join(sys.argv), "\n")
    rows, worth = [], []
    with tempfile.TemporaryDirectory() as scratch:
        # Every size of vocabulary from all text, and the smallest also from less of it.
        plan = [(min(given.vocab_sizes), m) for m in sorted(given.megabytes)[:-1]]
        plan += [(size, max(given.megabytes)) for size in given.vocab_sizes]
        for size, megabytes in plan:
            for threads in given.threads:
                out = Path(scratch) / f"{size}-{megabytes}-{threads}"
                rows.append(trained(given.folder, megabytes, size, threads, out))
                print(json.dumps(rows[-1]), flush=True)
        for size in given.vocab_sizes:
            out = Path(scratch) / f"{size}-{max(given.megabytes)}-{given.threads[0]}"
            worth.append(compression("ours", Tokenizer.load(out), given.folder))
        if given.beside:
            worth.append(compression(given.beside.stem, Tokenizer.load(given.beside), given.folder))
    print("\n" + training_table(rows), "\n\n" + compression_table(worth))
    write_json(given.json, {"environment": facts, "training": rows, "compression": worth})


if __name__ == "__main__":
    main()
