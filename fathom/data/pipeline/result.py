"""The prepared folder itself: shards moved into place, tokenizer, names of files, rejects and the manifest."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fathom.data.manifest import write_manifest
from fathom.data.pipeline.deduplication import EXACT, NEAR
from fathom.data.pipeline.making import Making, dtype_of, result_counts
from fathom.data.pipeline.packing import ShardRecord
from fathom.data.pipeline.reading import read_texts
from fathom.data.pipeline.work import synchronise
from fathom.data.rejects import QUOTED, Rejects
from fathom.data.tokenizer import Tokenizer
from fathom.errors import DataError

Records = dict[tuple[str, str], list[ShardRecord]]
FILES, REJECTS = "files.json", "rejects.jsonl"


def write_result(
    making: Making, tokenizer: Tokenizer, records: Records, weights: dict[str, float]
) -> None:
    """Fill `making.work.result`, wherever an earlier process left it. Raises `DataError` for too little text."""
    folder = making.work.result
    folder.mkdir(exist_ok=True)
    _check_enough(result_counts(records, "tokens"))
    for (name, _), some in records.items():
        (folder / name).mkdir(exist_ok=True)
        for record in some:
            _move(making, folder, record)
    tokenizer.save(folder)
    names = {
        source.name: [file.name for file in files]
        for source, files in zip(making.plan.settings.sources, making.plan.files, strict=True)
    }
    (folder / FILES).write_text(json.dumps(names, ensure_ascii=False, indent=0), encoding="utf-8")
    rejects = _write_rejects(making, folder / REJECTS)
    write_manifest(folder, _manifest(making, tokenizer, records, weights, rejects))
    synchronise(folder)


def _check_enough(tokens: dict[str, int]) -> None:
    for side, count in tokens.items():
        if count < 2:
            raise DataError(
                f"the {side.replace('_', '-')} part has {count} tokens and at least 2 are needed; "
                f"give more text or another held_out"
            )


def _move(making: Making, folder: Path, record: ShardRecord) -> None:
    source, file = record.file.split("/")
    piece = making.work.piece("packed", f"{source}.{file}")
    for ending in (".bin", ".npy"):
        if (piece / f"{file}{ending}").exists():  # not moved before a kill
            (piece / f"{file}{ending}").rename(folder / f"{record.file}{ending}")


def _write_rejects(making: Making, path: Path) -> Rejects:
    """A line per reject, filtered document and duplicate; gives the rejects."""
    rejects = Rejects()
    with path.open("w", encoding="utf-8") as file:
        for line in _reject_lines(making):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            if line["kind"] == "unreadable":
                rejects.add(line["reason"], f"{line['source']}/{line['place']}", line["quote"])
    return rejects


def _reject_lines(making: Making) -> Iterator[dict[str, Any]]:
    plan, corpus = making.plan, making.corpus
    for source, found in zip(plan.settings.sources, plan.rejects, strict=True):
        for reason, place in found.lines:
            yield _line(source.name, place, "unreadable", reason, "")
    for i, (unit, piece) in enumerate(zip(plan.units, corpus.pieces, strict=True)):
        name = plan.settings.sources[unit.source].name
        with open(piece / "rejects.jsonl", encoding="utf-8") as file:
            for line in map(json.loads, file):
                begun_before = line["file"] == unit.files[0] and line["row"]
                row = line["row"] + (corpus.first_rows[i] if begun_before else 0)
                place = _place(plan.files[unit.source][line["file"]].name, row)
                yield _line(name, place, line["kind"], line["reason"], line["quote"])
    yield from _duplicate_lines(making)


def _line(source: str, place: str, kind: str, reason: str, quote: str) -> dict[str, Any]:
    return {"source": source, "place": place, "kind": kind, "reason": reason, "quote": quote}


def _place(file: str, row: int) -> str:
    return f"{file}:{row}" if row else file


def _duplicate_lines(making: Making) -> Iterator[dict[str, Any]]:
    corpus, files = making.corpus, making.plan.files
    sources = corpus.sources()
    names = [source.name for source in making.plan.settings.sources]

    def place(document: int) -> str:
        entry = corpus.index[document]
        return _place(files[sources[document]][entry["file"]].name, int(entry["row"]))

    for document, kind, first in making.duplicates.dropped():
        unit = int(np.searchsorted(corpus.first, document, side="right")) - 1
        text = next(read_texts(corpus.pieces[unit], corpus.index[document : document + 1]))
        reason = f"repeats {names[sources[first]]}/{place(first)}"
        yield _line(
            names[sources[document]], place(document), f"{kind} duplicate", reason, text[:QUOTED]
        )


def _manifest(
    making: Making, tokenizer: Tokenizer, records: Records, weights: dict[str, float], rejects: Rejects
) -> dict[str, Any]:  # fmt: skip
    kinds = {split.kind for split in making.splits}
    shards: dict[str, dict[str, list]] = {}
    for (name, side), some in records.items():
        shards.setdefault(name, {})[side] = [asdict(record) for record in some]
    return {
        "settings": making.plan.settings.to_dict(),
        "weights": weights,
        "held_out_kind": kinds.pop() if len(kinds) == 1 else "mixed",
        "python": platform.python_version(),
        "content_sha256": making.content_sha256(),
        "content_bytes": int(making.corpus.index["bytes"][making.kept].sum()),
        "content_documents": len(making.kept),
        "vocab_size": tokenizer.vocab_size,
        "unused_tokens": tokenizer.placeholders,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "rejects": {"counts": dict(rejects.counts), "examples": rejects.examples},
        "filters": dict(making.corpus.counted("filters")),
        "duplicates": _duplicate_counts(making, None),
        "dtype": dtype_of(tokenizer),
        **{field: result_counts(records, field) for field in ("documents", "bytes", "tokens")},
        "sources": _source_counts(making, records),
        "shards": shards,
    }


def _duplicate_counts(making: Making, source: int | None) -> dict[str, int]:
    sources = making.corpus.sources()
    dropped = making.duplicates.dropped()
    kinds = Counter(kind for i, kind, _ in dropped if source in (None, sources[i]))
    return {kind: kinds[kind] for kind in (EXACT, NEAR)}


def _source_counts(making: Making, records: Records) -> dict[str, Any]:
    found = {}
    for i, source in enumerate(making.plan.settings.sources):
        own = {key: some for key, some in records.items() if key[0] == source.name}
        found[source.name] = {
            "path": source.path,
            "held_out_kind": making.splits[i].kind,
            **{field: result_counts(own, field) for field in ("documents", "bytes", "tokens")},
            "rejects": dict(making.corpus.counted("rejects", i) + making.plan.rejects[i].counts),
            "filters": dict(making.corpus.counted("filters", i)),
            "duplicates": _duplicate_counts(making, i),
            "blank": making.corpus.counted("blank", i)["blank"],
        }
    return found
