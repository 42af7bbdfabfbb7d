"""`fathom export`: a model as a Hugging Face directory of its own, or as a GGUF file for llama.cpp."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from fathom.cli.options import Ema
from fathom.errors import FathomError


class Format(enum.StrEnum):
    """What can be written."""

    HF = "hf"
    GGUF = "gguf"


class Dtype(enum.StrEnum):
    """What the weights of a Hugging Face directory can be written as."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Type(enum.StrEnum):
    """What the matrices of a GGUF file can be written as."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"


def export(
    run_or_dir: Annotated[
        Path, typer.Argument(metavar="RUN_OR_DIR", help="Run folder or exported directory.")
    ],
    place: Annotated[
        Path,
        typer.Argument(
            metavar="DIR_OR_FILE",
            help="Where to write; made, or replaced. A directory, for gguf a file.",
        ),
    ],
    format: Annotated[
        Format,
        typer.Option(help="hf: a Hugging Face directory; gguf: a file that llama.cpp reads."),
    ] = Format.HF,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights, for hf (default: as they are).")
    ] = None,
    kind: Annotated[
        Type | None,
        typer.Option("--type", help="Of the matrices, for gguf (default: as they are)."),
    ] = None,
    mtp: Annotated[
        bool,
        typer.Option("--mtp", help="For gguf: the first MTP module too, to draft with."),
    ] = False,
    ema: Ema = False,
) -> None:
    """Write a model as a Hugging Face directory that transformers and other programs read, or as GGUF for llama.cpp.

    Of a run that is still going on, the newest checkpoint is taken.
    """
    if dtype and format is Format.GGUF:
        raise FathomError(f"--dtype {dtype} is for --format hf; with gguf, use --type")
    if kind and format is Format.HF:
        raise FathomError(f"--type {kind} is for --format gguf; with hf, use --dtype")
    if mtp and format is Format.HF:
        raise FathomError("--mtp is for --format gguf; hf holds MTP modules always; leave it out")
    import torch

    import fathom
    from fathom.cli.opening import open_model

    model, tokenizer, origin = open_model(run_or_dir, ema=ema)
    without = "" if tokenizer else ", without a tokenizer, as there is none in the source"
    if format is Format.GGUF:
        fathom.save_gguf(model, place, tokenizer, kind, mtp)
        size = f"{place.stat().st_size / 1e6:,.1f} MB"
        depth = model.config.num_nextn_predict_layers - mtp
        left_out = f", without {depth} of its MTP modules" if depth else ""
        print(f"{place}: {size} from {origin}{left_out}{without}")
        return
    fathom.save(model, place, tokenizer, getattr(torch, dtype) if dtype else None)
    print(f"{place}: {model.num_parameters():,} parameters from {origin}{without}")
