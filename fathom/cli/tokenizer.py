"""`fathom tokenizer`: learn a tokenizer from text, or see how one cuts a text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fathom.errors import FathomError

if TYPE_CHECKING:
    from fathom.data.tokenizer import Tokenizer
    from fathom.data.tokenizer_training import Trained

COLOURS = ("black on bright_cyan", "black on bright_yellow")
"""Tokens next to each other, on a terminal."""


def tokenizer(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help='Text to learn from: files, folders, or "stdlib"; with --show, a tokenizer or its folder.',
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the tokenizer.")] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            help="Ids, control tokens included; 128815 and more are laid out as released."
        ),
    ] = None,
    read_at_most: Annotated[
        int, typer.Option(metavar="MB", min=1, help="Of more text than this, learn from a part.")
    ] = 100,
    show: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Show the pieces, tokens and ids of a text.")
    ] = None,
) -> None:
    """Learn a byte-level BPE with the released pre-tokenisation, or show how one cuts a text."""
    if show is not None:
        _show(show, sources, out, vocab_size)
    elif out is None or vocab_size is None:
        raise FathomError(
            "learning a tokenizer needs --out DIR and --vocab-size N; "
            "to see how one cuts a text, give --show TEXT and its folder"
        )
    else:
        _train(sources, out, vocab_size, read_at_most * 1_000_000)


def _train(sources: list[str], out: Path, vocab_size: int, read_at_most: int) -> None:
    from fathom.data.tokenizer import TOKENIZER_FILE
    from fathom.data.tokenizer_training import train_on

    if (out / TOKENIZER_FILE).exists():
        raise FathomError(
            f"{out} already holds a tokenizer; choose another folder or remove this one"
        )
    there = next(place for place in (out, *out.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise FathomError(f"{there} is no folder that can be written to; choose another --out")
    trained = train_on(sources, vocab_size, lambda line: print(line, flush=True), read_at_most)
    trained.tokenizer.save(out)
    print(_summary(trained, out))


def _summary(trained: Trained, out: Path) -> str:
    made = trained.tokenizer
    return (
        f"{out}: {made.vocab_size:,} ids, learned in {trained.seconds:.0f} s; "
        f"{trained.bytes_per_token:.2f} bytes per token on this text; "
        f"{made.placeholders:,} place holders that no text gives"
    )


def _show(text: str, sources: list[str], out: Path | None, vocab_size: int | None) -> None:
    from fathom.data.tokenizer import Tokenizer

    if len(sources) != 1 or out is not None or vocab_size is not None:
        raise FathomError("--show takes one tokenizer and no other option; give its folder alone")
    _print_pieces(Tokenizer.load(sources[0]), text)


def _print_pieces(shown: Tokenizer, text: str) -> None:
    """A line for each piece: its tokens, coloured on a terminal and with bars between them anywhere, and their ids."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    pieces = shown.pieces(text)
    for _, ids in pieces:
        line = Text()
        for i, token in enumerate(ids):
            line.append("|" if i else "")
            line.append(_visible(shown.decode([token])), COLOURS[i % 2])
        console.print(line + Text("  " + " ".join(map(str, ids)), "dim"))
    count = sum(len(ids) for _, ids in pieces)
    size = len(text.encode())
    rate = f", {size / count:.2f} bytes per token" if count else ""
    print(f"{count} tokens in {len(pieces)} pieces for {size} bytes{rate}")


def _visible(token: str) -> str:
    """Blanks and control characters as something one can see."""
    marks = {" ": "·", "\n": "↵", "\t": "→"}
    return "".join(marks.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in token)
