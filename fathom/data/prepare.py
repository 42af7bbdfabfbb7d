"""From sources to prepared tokens (report §4.1), once, atomically, for any size of corpus.

A prepared folder holds, for every source, shards of tokens with their document index; the tokenizer's two files;
rejects.jsonl with every record that was not used; and manifest.json. Documents are packed in a shuffled order with
end-of-sentence after each, without any mask between them. docs/data.md describes the files, `pipeline` makes them.

A source of few documents cannot be divided by documents: then the tail of each document is held out instead, and the
manifest's `held_out_kind` says so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fathom.data.manifest import (
    check_same,
    home,
    is_prepared,
    note_opened,
    read_manifest,
    write_manifest,
)
from fathom.data.normalise import DEFAULT_NORMALISATION
from fathom.data.pipeline.deduplication import NONE
from fathom.data.pipeline.making import Making, loaded_tokenizer
from fathom.data.pipeline.plan import TRAINED, Plan, Settings, settings_of
from fathom.data.pipeline.result import write_result
from fathom.data.pipeline.work import WorkFolder
from fathom.data.pipeline.workers import Workers, available_cores
from fathom.data.prepared import TokenData
from fathom.data.progress import Say, silent
from fathom.data.rejects import Rejects
from fathom.data.sources import parse_sources
from fathom.data.split import DOCUMENTS
from fathom.errors import DataError, did_you_mean

_WORTH_WORKERS = 32_000_000
"""Bytes of text from which on starting worker processes saves time."""


def prepare(
    out_dir: str | Path,
    sources: Sequence[str],
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    held_out: float = 0.05,
    held_out_kind: str = DOCUMENTS,
    seed: int = 0,
    fim_rate: float = 0.0,
    split_rate: float = 0.0,
    dedup: str = NONE,
    filters: Sequence[str] = (),
    weights: Mapping[str, float] | None = None,
    workers: int | None = None,
    say: Say | None = None,
    show: Say | None = None,
    normalise: Sequence[str] = DEFAULT_NORMALISATION,
) -> TokenData:
    """Tokens of `sources` in `out_dir`, made now or found there from before.

    sources: each "PATH" or "NAME=PATH" (see `read_documents`), or one folder that was prepared before: then that is
    opened, and what it was made with counts.
    tokenizer: "bpe" or "char" trains one on the training text, anything else is the path of one; `vocab_size` is what
    a trained one has and a loaded one may not exceed. held_out: share of the text never trained on; held_out_kind
    "documents" or "tail" (see `Split`).
    dedup: "none", "exact" or "near"; filters and normalise: names, see `filters` and `normalise`.
    weights: share of each source in the mixture, by name; only noted here. workers: processes, by default one per core
    where the text is worth it; the result is the same for any number.
    say: called with a line of text at each step; show: with a line of progress, twice a second.

    The folder appears whole or not at all, and one made with other settings is refused with the difference. Killed at
    any moment, the same call goes on from the work that is finished. Raises `DataError`, also for a source without
    any usable text.
    """
    place = Path(out_dir)
    folders = [Path(source.path) for source in parse_sources(sources)]
    if len(folders) == 1 and is_prepared(folders[0]):
        rates = {"fim_rate": fim_rate, "split_rate": split_rate}
        asked = {**rates, "dedup": dedup, "filters": list(filters)}
        return _open_prepared(place, folders[0], tokenizer, vocab_size, asked)
    settings = settings_of(
        sources, filters, normalise, tokenizer,
        vocab_size=vocab_size, held_out=held_out, held_out_kind=held_out_kind, seed=seed, dedup=dedup,
        fim_rate=fim_rate, split_rate=split_rate,
    )  # fmt: skip
    shares = _checked_weights(weights or {}, settings)
    building = WorkFolder(place.with_name(f".{place.name}.building"))
    if is_prepared(place):
        check_same(place, settings.to_dict())
        building.remove()  # of a process that was killed in its last moment
        _note_weights(place, shares)
    else:
        _make(place, building, settings, shares, workers, say or silent, show or silent)
    return TokenData.open(place)


def _checked_weights(weights: Mapping[str, float], settings: Settings) -> dict[str, float]:
    names = [source.name for source in settings.sources]
    for name, weight in weights.items():
        if name not in names:
            raise DataError(
                f"weight {name} = {weight} is of no source; {did_you_mean(name, names, 'there are')}"
            )
        if not 0 <= weight < math.inf:
            raise DataError(f"weight {name} = {weight} is not possible; give 0 or more")
    if weights and not sum(weights.values()) > 0:
        raise DataError("all weights are 0; give some source more")
    return dict(weights)


def _note_weights(place: Path, weights: dict[str, float]) -> None:
    """Weights change no token: a folder is not made again for them."""
    manifest = read_manifest(place)
    if manifest["weights"] != weights:
        write_manifest(place, manifest | {"weights": weights})


def _open_prepared(
    place: Path, folder: Path, tokenizer: str, vocab_size: int | None, asked: dict[str, Any]
) -> TokenData:
    """A folder prepared before, checked against what is asked for; noted in `place`, with its tokenizer."""
    folder = home(folder)
    made = read_manifest(folder)["settings"]
    if tokenizer == "char" and made["tokenizer"] == "bpe":
        asked = asked | {"tokenizer": tokenizer}
    for key, value in asked.items():
        if value and value != NONE and value != made[key]:
            raise DataError(
                f"{folder} was prepared with {key} {made[key]!r}, asked for is {value!r}; prepare it so, or leave "
                f"{key} out"
            )
    wanted = None
    if tokenizer not in TRAINED:
        wanted = loaded_tokenizer(tokenizer, vocab_size).fingerprint
    loaded_tokenizer(str(folder), vocab_size)
    data = TokenData.open(folder, wanted)
    if place.resolve() != folder.resolve():
        note_opened(place, folder, data.manifest)
        data.tokenizer.save(place)  # for whoever speaks with a model that is trained here
    return data


def _make(
    place: Path,
    building: WorkFolder,
    settings: Settings,
    weights: dict[str, float],
    workers: int | None,
    say: Say,
    show: Say,
) -> None:
    """Build everything beside `place` and rename it there."""
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise DataError(
            f"{place} exists and is not prepared data; choose another folder or remove it"
        )
    plan = Plan.make(settings)
    plan.check_packages()  # before finished work of an earlier process is at stake
    try:
        if building.claim(plan.mark()):
            say("going on where it was stopped")
        with Workers(_worker_count(workers, plan.bytes)) as pool:
            _build(Making(plan, building, pool, say, show), weights)
        if place.exists():
            place.rmdir()
        building.result.rename(place)
        building.remove()
    except OSError as error:
        raise DataError(
            f"{place} could not be prepared ({error}); make room or choose another folder. What is done is kept in "
            f"{building.path}, and the same command goes on from there"
        ) from error
    except DataError:
        building.remove()
        raise
    finally:
        building.release()


def _worker_count(workers: int | None, size: int) -> int:
    if workers is not None and workers < 1:
        raise DataError(f"workers={workers} must be 1 or more")
    return workers or (available_cores() if size >= _WORTH_WORKERS else 1)


def _build(making: Making, weights: dict[str, float]) -> None:
    settings = making.plan.settings
    making.say(f"reading {', '.join(source.path for source in settings.sources)}")
    making.read()
    _check_usable(making)
    rejects = _all_rejects(making)
    size = making.corpus.index["bytes"].sum() / 1e6
    making.say(f"{len(making.corpus.index):,} documents, {size:.1f} MB; {rejects}")
    making.deduplicate()
    tokenizer = making.tokenizer()
    making.say(f"encoding with {tokenizer.vocab_size:,} tokens")
    making.encode(tokenizer)
    records = making.pack(tokenizer)
    write_result(making, tokenizer, records, weights)


def _check_usable(making: Making) -> None:
    """Every source must give something."""
    sources = making.corpus.sources()
    for i, source in enumerate(making.plan.settings.sources):
        if (sources == i).any():
            continue
        unread = making.corpus.counted("rejects", i) + making.plan.rejects[i].counts
        dropped = making.corpus.counted("filters", i)
        reasons = [f"{n} rejected: {reason}" for reason, n in unread.items()]
        reasons += [f"{n} dropped by {name}" for name, n in dropped.items()]
        raise DataError(
            f"nothing to train on in {source.path}: {'; '.join(reasons) or 'there is no text in it'}; "
            f"give .txt, .md, code, .jsonl or .parquet"
        )


def _all_rejects(making: Making) -> str:
    counts = Counter(making.corpus.counted("rejects"))
    for found in making.plan.rejects:
        counts += found.counts
    return Rejects(counts, ["see rejects.jsonl"]).summary()
