"""How fast text becomes tokens, and in how much memory, beside `datasets` and `tokenizers` doing the same.

    python benchmarks/data_throughput.py FOLDER [--megabytes 80] [--rounds 3] [--workers 2] [--json FILE]

The corpus: the texts of FOLDER's .jsonl and .txt (.gz too), the Python standard library and the .py files of the
packages that are installed, each text once, shuffled, cut off at so many megabytes, in one .jsonl. The tokenizer:
byte-level BPE of 16,384 learned from every eighth of them, before anything is timed; both sides use the same file.

`fathom` prepares it with each kind of de-duplication: split, tokens, end of document, shuffle, shards with index and
sha256. `datasets` loads the .jsonl, maps the same tokenizer over it in batches with as many processes, appends end of
document and saves to disk; it neither splits nor shuffles nor removes anything. Every run is a process of its own with
a cache of its own; contenders take turns. Memory is the sum of the proportional set sizes (Pss) of the process and all
its children, every 50 ms, at its highest: all of it, and what is no mapped file and cannot be dropped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from harness import MIB, Times, describe, environment, spread, table, write_json

FATHOM = """
import sys
from fathom.data import prepare
if __name__ == "__main__":
    corpus, tokenizer, out, workers, dedup = sys.argv[1:]
    data = prepare(out, [corpus], tokenizer, None, 0.02, dedup=dedup, workers=int(workers))
    print(sum(data.manifest["tokens"].values()))
"""
DATASETS = """
import sys
from datasets import load_dataset
from tokenizers import Tokenizer
def encode(batch):
    return {"ids": [e.ids + [1] for e in tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)]}
if __name__ == "__main__":
    corpus, path, out, workers, _ = sys.argv[1:]
    tokenizer = Tokenizer.from_file(path + "/tokenizer.json")
    rows = load_dataset("json", data_files=corpus, split="train")
    rows = rows.map(encode, batched=True, num_proc=int(workers), remove_columns=rows.column_names)
    rows.save_to_disk(out)
    print(sum(map(len, rows.with_format("numpy")["ids"])))
"""
CONTENDERS = {
    "fathom, no de-duplication": (FATHOM, "none"),
    "fathom, exact": (FATHOM, "exact"),
    "fathom, near": (FATHOM, "near"),
    "datasets + tokenizers": (DATASETS, ""),
}


def main(arguments: list[str] | None = None) -> None:
    """Build the corpus, let the contenders take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    print(describe(environment()))
    print("command: python benchmarks/data_throughput.py", *(arguments or sys.argv[1:]), end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        corpus, size = build(options.folder, options.megabytes * 1e6, Path(folder))
        runs = measure(corpus, Path(folder), options.rounds, options.workers)
    print(table(*report(runs, size)))
    write_json(options.json, {"bytes": size, "runs": runs, "environment": environment()})


def build(folder: Path, size: float, place: Path) -> tuple[Path, int]:
    """corpus.jsonl and tokenizer/ in `place`; the path and the bytes of text in it."""
    from fathom.data import Tokenizer

    texts, known, composition = [], set(), {}
    for kind, text in sources(folder):
        mark = sha256(text.encode()).digest()
        if mark not in known:
            known.add(mark)
            texts.append((kind, text))
    random.Random(0).shuffle(texts)
    total = 0
    with (place / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for used, (kind, text) in enumerate(texts):
            if total >= size:
                texts = texts[:used]
                break
            total += len(text.encode())
            composition[kind] = composition.get(kind, 0) + len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    parts = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in sorted(composition.items()))
    print(f"corpus: {len(texts):,} different texts, {total / 1e6:.1f} MB ({parts})", flush=True)
    Tokenizer.train((text for _, text in texts[::8]), 16_384).save(place / "tokenizer")
    return place / "corpus.jsonl", total


def sources(folder: Path) -> Iterator[tuple[str, str]]:
    """(where from, text) of everything at hand, in a fixed order."""
    for path in sorted(folder.iterdir()):
        if ".jsonl" in path.suffixes or ".txt" in path.suffixes:
            content = path.read_bytes()
            text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
            if ".txt" in path.suffixes:
                yield folder.name, text
            else:
                yield from ((folder.name, json.loads(line)["text"]) for line in text.splitlines())
    paths = sysconfig.get_paths()
    for kind, place in (("standard library", paths["stdlib"]), ("packages", paths["purelib"])):
        for path in sorted(Path(place).rglob("*.py")):
            if kind == "packages" or "site-packages" not in path.parts:
                text = path.read_text(encoding="utf-8", errors="ignore").replace("\0", "")
                if text.strip():
                    yield kind, text


def measure(corpus: Path, place: Path, rounds: int, workers: int) -> dict[str, list[dict]]:
    """Every contender once a round, another one first each time."""
    names = list(CONTENDERS)
    runs: dict[str, list[dict]] = {name: [] for name in names}
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            found = run(name, corpus, place / "tokenizer", place / f"run-{turn}-{i}", workers)
            runs[name].append(found)
            print(f"round {turn + 1}: {name}: {found}", flush=True)
    return runs


def run(name: str, corpus: Path, tokenizer: Path, place: Path, workers: int) -> dict:
    """Wall and CPU seconds, peak memory in bytes and the tokens of one run."""
    script, dedup = CONTENDERS[name]
    place.mkdir()
    (place / "script.py").write_text(script)
    arguments = [place / "script.py", corpus, tokenizer, place / "out", workers, dedup]
    settings = {
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        "HF_HOME": str(place / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    before, began = os.times(), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    peak, anonymous = 0, 0
    while process.poll() is None:
        now = tree_memory(process.pid)
        peak, anonymous = max(peak, now[0]), max(anonymous, now[1])
        time.sleep(0.05)
    seconds, after = time.perf_counter() - began, os.times()
    if process.returncode:
        raise SystemExit(f"{name} failed with status {process.returncode}")
    used = sum(after[2:4]) - sum(before[2:4])
    tokens = int(process.communicate()[0].split()[-1])
    found = {"seconds": seconds, "cpu_seconds": used, "tokens": tokens}
    return found | {"peak_bytes": peak, "peak_anonymous_bytes": anonymous}


def tree_memory(pid: int) -> tuple[int, int]:
    """Pss of a process and everything it started, and the part of it that is no mapped file, in bytes."""
    whole, files, waiting = 0, 0, [pid]
    while waiting:
        one = waiting.pop()
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
            whole, files = whole + sizes["Pss:"], files + sizes.get("Pss_File:", 0)
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, KeyError):  # it has just ended
            continue
    return whole, whole - files


def report(runs: dict[str, list[dict]], size: int) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table."""
    headers = ["", "MB/s", "MB per CPU second", "seconds", "peak MiB", "of it no file", "tokens"]
    rows = []
    for name, some in runs.items():
        times = Times([one["seconds"] for one in some], [one["cpu_seconds"] for one in some])
        rates = [size / 1e6 / seconds for seconds in times.wall]
        cpu = [size / 1e6 / seconds for seconds in times.cpu]
        peaks = [
            max(one[key] for one in some) / MIB for key in ("peak_bytes", "peak_anonymous_bytes")
        ]
        figures = [spread(rates, 1), spread(cpu, 2), times.text(1, 1)]
        figures += [f"{peak:,.0f}" for peak in peaks]
        rows.append([name, *figures, f"{some[0]['tokens']:,}"])
    return headers, rows


if __name__ == "__main__":
    main()
