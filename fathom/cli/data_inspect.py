"""`fathom data inspect DIR`: what a prepared folder holds, in 80 columns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fathom.data import inspection
from fathom.data.pipeline.encoding import SIDES
from fathom.data.prepared import TokenData
from fathom.data.shards import Tokens

_FREQUENT = 20
_SHOWN_TOKENS = 200
_BAR = 30
_QUOTED = 60


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A prepared folder.")],
    source: Annotated[str | None, typer.Option(help="One source alone.")] = None,
    documents: Annotated[int, typer.Option(help="Samples of each source.")] = 3,
    held_out: Annotated[bool, typer.Option("--held-out", help="The held-out side.")] = False,
) -> None:
    """Show documents, lengths, tokens, samples and rejects of prepared data; every shard is verified on the way."""
    data = TokenData.open(folder)
    side = SIDES[held_out]
    tokens = data.tokens(side, source)
    console = Console(highlight=False)
    for part in (
        _sources(data),
        _origins(data),
        "",
        _lengths(tokens),
        "",
        _frequent(data, tokens),
        "",
    ):
        console.print(part)
    for name in data.names if source is None else (source,):
        for sample in inspection.samples(folder, data, side, name, documents, _SHOWN_TOKENS):
            _show_sample(console, data, sample)
    console.print()
    console.print(_rejects(folder, source))


def _table(title: str, *columns: str) -> Table:
    """Columns of numbers, and of text where "<" stands before the heading; two blanks between them and no frame."""
    table = Table(
        title=title, title_justify="left", title_style="bold",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for column in columns:
        text = column.startswith("<")
        table.add_column(column.lstrip("<"), justify="left" if text else "right", no_wrap=not text)
    return table


def _sources(data: TokenData) -> Table:
    table = _table(
        "sources", "<name", "weight", "documents", "tokens", "bytes per\ntoken",
        "held-out\ntokens", "<held\nout",
    )  # fmt: skip
    weights = data.manifest["weights"]
    for name, source in data.manifest["sources"].items():
        count = sum(source["tokens"].values())
        table.add_row(
            name,
            f"{weights.get(name, 0):g}" if weights else "by size",
            f"{source['documents']['train']:,}",
            f"{source['tokens']['train']:,}",
            f"{sum(source['bytes'].values()) / max(1, count):.2f}",
            f"{source['tokens']['held_out']:,}",
            source["held_out_kind"],
        )
    return table


def _origins(data: TokenData) -> Text:
    """Where each source lay; paths are too long for a column."""
    sources: dict[str, Any] = data.manifest["sources"]
    lines = [f"{name}: {source['path']}" for name, source in sources.items()]
    return Text("\n".join(lines), style="dim", overflow="fold")


def _lengths(tokens: Tokens) -> Table:
    table = _table("lengths in tokens", "from", "to", "documents", "tokens", "<")
    rows = inspection.length_histogram(tokens)
    most = max((count for *_, count in rows), default=1)
    for least, longest, documents, count in rows:
        bar = "█" * round(_BAR * count / most)
        table.add_row(f"{least:,}", f"{longest:,}", f"{documents:,}", f"{count:,}", bar)
    return table


def _frequent(data: TokenData, tokens: Tokens) -> Table:
    counts = inspection.token_counts(tokens, data.tokenizer.vocab_size)
    used, whole = int((counts > 0).sum()), max(1, len(tokens))
    table = _table(f"tokens: {used:,} of {len(counts):,} occur", "id", "<text", "times", "share")
    for token in np.argsort(-counts, kind="stable")[: min(_FREQUENT, used)].tolist():
        text = Text(repr(data.tokenizer.decode([token])))
        table.add_row(str(token), text, f"{counts[token]:,}", f"{counts[token] / whole:.2%}")
    return table


def _show_sample(console: Console, data: TokenData, sample: inspection.Sample) -> None:
    """A document between two rules, its end marked where it is shown."""
    console.rule(Text(f"{sample.place}, {sample.tokens:,} tokens"), align="left")
    end = data.tokenizer.decode([data.tokenizer.eos_id])
    text = sample.text.removesuffix(end)
    console.print(Text(_visible(text)))
    console.print(Text(f"▣ {end}" if text != sample.text else "…"), style="dim")


def _visible(text: str) -> str:
    """Without characters that a terminal would act upon."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)


def _rejects(folder: Path, source: str | None) -> Table:
    """How many of each kind, and under it the first of them."""
    counts, first = inspection.reject_summary(folder)
    table = _table("left out", "documents", "<of which source, and why")
    for (name, kind, reason), count in counts.most_common():
        if source in (None, name):
            line = first[name, kind, reason]
            why = f"{name}: {kind}" + (f", {reason}" if reason else "")
            table.add_row(f"{count:,}", Text.assemble(why, (f"\n{_example(line)}", "dim")))
    return table


def _example(line: dict[str, Any]) -> str:
    """Of an unreadable record the reason is in the line above already."""
    why = "" if line["kind"] == "unreadable" else f"{line['reason']}: "
    return f"{line['place']}: {why}{line['quote'][:_QUOTED]!r}"
