"""`fathom data prepare SOURCE… --out DIR`: text to tokens, once for many runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fathom.cli.console import TextConsole
from fathom.data.filters import FILTERS
from fathom.data.normalise import DEFAULT_NORMALISATION
from fathom.errors import DataError

USUAL_SIZE = 32_768
"""Vocabulary of a BPE that is trained here, where none is asked for (our choice; the report's is 128K)."""


def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="PATH or NAME=PATH: a file or folder of .txt, .md, code, .jsonl (.gz, .zst), .parquet; "
            "hf:NAME[:CONFIG][:SPLIT]; stdlib.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    tokenizer: Annotated[
        str, typer.Option(help="bpe or char trains one; anything else is the path of one.")
    ] = "bpe",
    vocab_size: Annotated[
        int | None, typer.Option(help=f"Size of a trained one; of bpe {USUAL_SIZE}.")
    ] = None,
    held_out: Annotated[float, typer.Option(help="Share that is never trained on.")] = 0.02,
    held_out_kind: Annotated[
        str, typer.Option(help="documents: hold out whole ones; tail: the end of each.")
    ] = "documents",
    weights: Annotated[
        str, typer.Option(help="Shares of the sources in the mixture: en=0.5,zh=0.5.")
    ] = "",
    dedup: Annotated[str, typer.Option(help="none, exact or near.")] = "near",
    filter_: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            help=f"NAME, NAME=LIMIT or FILE.py:FUNCTION; several in turn. Names: {', '.join(FILTERS)}.",
        ),
    ] = None,
    normalise: Annotated[
        list[str] | None, typer.Option(help="Further normalisations: nfc, line_ends, …")
    ] = None,
    fim_rate: Annotated[float, typer.Option(help="Share of documents in FIM form.")] = 0.0,
    split_rate: Annotated[
        float, typer.Option(help="Share of merged tokens that are split at random.")
    ] = 0.0,
    workers: Annotated[int | None, typer.Option(help="Processes; by default one per core.")] = None,
    seed: Annotated[int, typer.Option(help="Decides split and order.")] = 0,
) -> None:
    """Make text into tokens to train on: fathom run RECIPE --data DIR.

    Killed at any moment, the same command goes on from the work that is finished.
    """
    from fathom.data.prepare import prepare as make

    with TextConsole() as shown:
        try:
            data = make(
                out,
                sources,
                tokenizer,
                vocab_size or (USUAL_SIZE if tokenizer == "bpe" else None),
                held_out,
                held_out_kind,
                seed,
                fim_rate,
                split_rate,
                dedup,
                filter_ or (),
                _weights(weights),
                workers,
                shown.say,
                shown.show,
                (*DEFAULT_NORMALISATION, *(normalise or ())),
            )
        except KeyboardInterrupt:
            shown.say("stopped; the same command goes on from there")
            raise
    _tell(data.manifest, out)


def _tell(manifest: dict, out: Path) -> None:
    documents, tokens = manifest["documents"], manifest["tokens"]
    left_out = {**manifest["rejects"]["counts"], **manifest["filters"]}
    left_out |= {f"{kind} duplicate": n for kind, n in manifest["duplicates"].items() if n}
    for name, source in manifest["sources"].items():
        print(
            f"{name:16} {source['documents']['train']:>12,} documents {source['tokens']['train']:>15,} tokens"
        )
    print(
        f"to train on: {documents['train']:,} documents, {tokens['train']:,} tokens; "
        f"held out: {documents['held_out']:,} documents, {tokens['held_out']:,} tokens"
    )
    if left_out:
        told = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items())
        print(f"left out: {told}; each is in {out}/rejects.jsonl")
    print(
        f"\nlook at it:  fathom data inspect {out}    train on it:  fathom run RECIPE --data {out}"
    )


def _weights(text: str) -> dict[str, float]:
    """ "en=0.5,zh=0.5" as numbers by name."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    try:
        return {name.strip(): float(value) for name, _, value in pairs}
    except ValueError:
        raise DataError(f"--weights {text!r} is not understood; write en=0.5,zh=0.5") from None
